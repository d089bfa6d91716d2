"""Studies on digits: what they run, keep, choose and write."""

import csv
import json
from dataclasses import replace

import pytest

from blockprop.experiments.settings import Settings
from blockprop.studies.drawing import band, curves, figure_of
from blockprop.studies.publish import publish
from blockprop.studies.study import TUNING_SEED, Row, Study, run_study
from blockprop.training import Training

BASE = Settings(data="digits", width=16, steps=12, evaluate_every=6, log_every=6, threads=1)
BACKPROP = replace(BASE, algorithm="backprop")


def draw(study, outcomes):
    figure, (axes, *_) = figure_of(study.title, 1, 2)
    for outcome in outcomes:
        band(axes, curves(outcome, "validation", "accuracy"), {"label": outcome.row.label})
    return figure


def study_of(*rows, seeds=(0, 1)):
    return Study(
        name="tiny",
        title="A tiny study",
        about="Nothing of note.",
        rows=rows,
        seeds=seeds,
        draw=draw,
        tell=lambda _, outcomes: f"{len(outcomes)} rows",
    )


def folders(out):
    return sorted(str(path.parent.relative_to(out / "runs")) for path in out.rglob("summary.json"))


def test_rows_with_equal_settings_share_their_runs(tmp_path):
    study = study_of(Row("left", "backprop", BACKPROP), Row("right", "backprop", BACKPROP), Row("right", "exact", BASE))
    run_study(study, tmp_path, quiet=True)
    assert folders(tmp_path) == [f"{row}/seed-{s}" for row in ("left/backprop", "right/exact") for s in (0, 1)]
    left, right, exact = study.outcomes(tmp_path)
    assert left.summaries == right.summaries and len(exact.summaries) == 2


def test_a_finished_run_is_lean_and_never_made_again(tmp_path):
    study = study_of(Row("p", "exact", BASE))
    run_study(study, tmp_path, quiet=True)
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "runs/p/exact/seed-0").iterdir()}
    assert sorted(files) == ["config.json", "metrics.jsonl", "summary.json"]
    more = study_of(Row("p", "exact", BASE), seeds=(0, 1, 2))
    run_study(more, tmp_path, quiet=True)
    assert files == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "runs/p/exact/seed-0").iterdir()}
    assert len(more.outcomes(tmp_path)[0].summaries) == 3


def test_a_stopped_run_continues_from_its_checkpoint(tmp_path, monkeypatch):
    study = study_of(Row("p", "exact", replace(BASE, checkpoint_every=4)), seeds=(0,))
    run_study(study, tmp_path / "whole", quiet=True)
    take = Training._take

    def stop_at_9(self, *arguments):
        if self.step == 9:
            raise KeyboardInterrupt
        take(self, *arguments)

    monkeypatch.setattr(Training, "_take", stop_at_9)
    with pytest.raises(KeyboardInterrupt):
        run_study(study, tmp_path / "parts", quiet=True)
    started = []
    monkeypatch.setattr(Training, "_take", lambda self, *rest: (started.append(self.step), take(self, *rest)))
    run_study(study, tmp_path / "parts", quiet=True)
    assert started == [8, 9, 10, 11]
    whole, parts = (
        json.loads((tmp_path / name / "runs/p/exact/seed-0/summary.json").read_text()) for name in ("whole", "parts")
    )
    assert whole["test_loss"] == parts["test_loss"]


def test_the_step_size_is_chosen_by_validation_with_a_seed_of_its_own(tmp_path):
    row = Row("p", "backprop", BACKPROP, lrs=(1e-6, 0.1, 1e38))
    study = study_of(row)
    (before,) = study.outcomes(tmp_path)
    assert before.lr is None
    run_study(study, tmp_path, quiet=True)
    (outcome,) = study.outcomes(tmp_path)
    assert outcome.lr == 0.1 and outcome.diverged == 0
    tuning = [f"lr-{lr}/seed-{TUNING_SEED}" for lr in ("0.1", "1e+38", "1e-06")]
    assert folders(tmp_path) == [f"p/backprop/{n}" for n in ("lr-0.1/seed-0", "lr-0.1/seed-1", *tuning)]
    read = [json.loads((folder / "config.json").read_text()) for folder in outcome.folders.values()]
    assert [(one["lr"], one["seed"]) for one in read] == [(0.1, 0), (0.1, 1)]
    assert json.loads((tmp_path / f"runs/p/backprop/lr-1e+38/seed-{TUNING_SEED}/summary.json").read_text())["diverged"]
    assert (
        json.loads((tmp_path / f"runs/p/backprop/lr-0.1/seed-{TUNING_SEED}/config.json").read_text())["seed"]
        == TUNING_SEED
    )


def test_the_runs_that_choose_a_step_size_may_be_shorter(tmp_path):
    study = study_of(Row("p", "backprop", BACKPROP, lrs=(0.05, 0.1), tuning=(("steps", 6),)), seeds=(0,))
    run_study(study, tmp_path, quiet=True)
    (outcome,) = study.outcomes(tmp_path)
    tuned = tmp_path.glob(f"runs/p/backprop/lr-*/seed-{TUNING_SEED}/summary.json")
    assert [json.loads(path.read_text())["steps"] for path in tuned] == [6, 6]
    assert outcome.summaries[0]["steps"] == 12
    other = study_of(Row("p", "backprop", BACKPROP, lrs=(0.05, 0.1)), seeds=(0,))
    with pytest.raises(ValueError, match="other settings"):
        other.check(tmp_path)


def test_processes_give_the_same_as_one(tmp_path):
    study = study_of(Row("p", "backprop", BACKPROP, lrs=(0.01, 0.1)), Row("p", "exact", BASE))
    run_study(study, tmp_path / "one", quiet=True)
    run_study(study, tmp_path / "two", jobs=2, quiet=True)
    one, two = (study.outcomes(tmp_path / name) for name in ("one", "two"))
    assert [o.values("test_loss") for o in one] == [o.values("test_loss") for o in two]
    assert [o.lr for o in one] == [o.lr for o in two]


def test_what_is_published(tmp_path):
    study = study_of(Row("p", "backprop", BACKPROP), Row("p", "diverges", replace(BASE, lr=1e38)))
    publish(study, tmp_path, "blockprop tiny")
    assert "0 of 2 rows" in (tmp_path / "README.md").read_text()
    run_study(study, tmp_path, quiet=True)
    publish(study, tmp_path, "blockprop tiny")
    readme = (tmp_path / "README.md").read_text()
    for part in ("# A tiny study", "    blockprop tiny\n", "torch 2", "cores", "2 rows", "Nothing of note."):
        assert part in readme
    assert "Unfinished" not in readme
    with (tmp_path / "tiny-points.csv").open() as file:
        points = list(csv.DictReader(file))
    assert [(p["row"], p["seed"], p["step"]) for p in points if p["row"] == "backprop"] == [
        ("backprop", seed, step) for seed in "01" for step in ("6", "12")
    ]
    with (tmp_path / "tiny-rows.csv").open() as file:
        rows = {row["row"]: row for row in csv.DictReader(file)}
    assert (rows["backprop"]["seeds"], rows["diverges"]["diverged"]) == ("2", "2")
    assert float(rows["backprop"]["test_accuracy_mean"]) == pytest.approx(
        sum(json.loads(path.read_text())["test_accuracy"] for path in tmp_path.rglob("backprop/*/summary.json")) / 2,
        abs=1e-6,
    )
    pictures = [(tmp_path / f"tiny.{ending}").read_bytes() for ending in ("png", "svg")]
    publish(study, tmp_path, "blockprop tiny")
    assert pictures == [(tmp_path / f"tiny.{ending}").read_bytes() for ending in ("png", "svg")]


@pytest.mark.parametrize("seeds", [(), (0, 0), (TUNING_SEED,)])
def test_seeds_that_will_not_do(tmp_path, seeds):
    with pytest.raises(ValueError, match="seed"):
        run_study(study_of(Row("p", "exact", BASE), seeds=seeds), tmp_path)


def test_other_settings_are_not_mixed_in(tmp_path):
    run_study(study_of(Row("p", "exact", BASE), seeds=(0,)), tmp_path, quiet=True)
    with pytest.raises(ValueError, match="other settings"):
        run_study(study_of(Row("p", "exact", replace(BASE, width=8)), seeds=(0,)), tmp_path, quiet=True)
