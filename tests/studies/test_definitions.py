"""The studies' rows: what they are made of, without running them."""

import json
from dataclasses import replace

import pytest

from blockprop.cli import main
from blockprop.studies.beyond import beyond
from blockprop.studies.figure2 import figure2, link_scale
from blockprop.studies.figure3 import figure3
from blockprop.studies.gap import gap, pooled_sd
from blockprop.studies.publish import publish
from blockprop.studies.study import Outcome, run_study

STUDIES = {
    "figure 2": figure2(),
    "figure 2 quick": figure2(quick=True),
    "figure 3": figure3(),
    "figure 3 quick": figure3(quick=True),
    "beyond": beyond(),
    "gap": gap(),
    "gap quick": gap(quick=True),
}

COMMAND = "blockprop.commands.figure"


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_every_row_is_a_run_of_its_own_or_shares_one(study, tmp_path):
    names = [row.name for row in study.rows]
    assert len(set(names)) == len(names)
    folders = study.folders(tmp_path)
    assert len(folders) == len(study.rows)
    for row in study.rows:
        resolved = row.settings.resolved()
        assert resolved == resolved.resolved()
        if row.lrs:
            assert row.settings.validation and row.settings.evaluate_on == "validation", "chosen on the validation part"
        else:
            assert row.settings.evaluate_on == "test" and row.settings.validation == 0


def test_the_baseline_is_in_every_panel():
    for name, study in STUDIES.items():
        for panel in study.panels:
            assert any(row.label.startswith("backprop") for row in study.rows if row.panel == panel), (name, panel)


def test_link_scale_is_the_formula():
    for penalty, h_lr, n in ((1.0, 0.01, 1), (0.1, 0.01, 4), (50.0, 0.01, 2), (10.0, 0.03, 8)):
        assert link_scale(penalty, h_lr, n) == pytest.approx(1 - (1 - 2 * penalty * h_lr) ** n)


def test_figure_2_matches_block_1_alone():
    rows = {row.name: row.settings for row in figure2().rows}
    published, matched = (rows[f"λ at N_h = 4: {kind}, λ = 10"] for kind in ("published", "matched"))
    assert (published.form, published.h_steps, published.h_lr, published.penalty) == ("published", 4, 0.01, (10.0,))
    assert matched.algorithm == "backprop"
    assert matched.block_lr == pytest.approx((0.1 * (1 - 0.8**4), 0.1))


def test_the_full_figure_3_is_the_papers_network_and_says_if_it_is_smaller():
    full, small = figure3(), figure3(width=8, epochs=2, train_size=1000)
    assert {(row.settings.width, row.settings.train_size) for row in full.rows} == {(64, None)}
    assert "width 8, 2 epochs of 1,000 images" in small.title and "width 8" in small.about
    assert {row.settings.dropout for row in full.rows} == {0.0, 0.2}
    assert {row.settings.resolved().blocks for row in full.rows} == {2, 3, 4}


def test_the_gap_has_every_method_on_every_network_with_an_equal_search():
    study = gap()
    of_panel = {panel: [row for row in study.rows if row.panel == panel] for panel in study.panels}
    assert len(of_panel) == 4 + 12 + 4 + 4 + 2
    for panel, rows in of_panel.items():
        methods = {"backprop", "exact", "published", "rescaled"} | ({"Gauss-Newton"} if "MLP" in panel else set())
        if "batches of 100" in panel:  # of the exact form's check alone
            methods = {"backprop", "exact"}
        assert {row.label for row in rows} == methods
        assert len({row.lrs for row in rows}) == 1 and len(rows[0].lrs) >= 3
        assert len({(row.settings.epochs, row.settings.steps, row.settings.batch_size) for row in rows}) == 1
        assert {len(study.seeds_of(row)) for row in rows} == {10 if "100" in panel else 5 if "MLP" in panel else 3}


def outcome(row, accuracies):
    summaries = {s: {"test_accuracy": a, "test_loss": 1.0} for s, a in enumerate(accuracies)}
    return Outcome(row, 0.1, summaries, {})


@pytest.mark.parametrize(
    ("shift", "passed"), [(0.0, True), (0.0099, True), (-0.0099, True), (0.0101, False), (-0.05, False)]
)
def test_the_check_of_the_gap_is_one_pooled_standard_deviation(shift, passed):
    study = gap(seeds=(0, 1, 2))
    study = replace(study, rows=study.rows[:2])
    backprop, exact = study.rows
    base = (0.97, 0.98, 0.99)
    assert pooled_sd(base, base) == pytest.approx(0.01)
    told = study.tell(study, [outcome(backprop, base), outcome(exact, [a - shift for a in base])])
    assert f"in {int(passed)} of 1 finished rows" in told
    assert f"In {int(shift == 0)} of them test loss and accuracy are backprop's" in told


def test_an_unfinished_row_is_not_judged():
    study = gap(seeds=(0, 1, 2))
    study = replace(study, rows=study.rows[:2])
    backprop, exact = study.rows
    told = study.tell(study, [outcome(backprop, (0.9, 0.91, 0.92)), outcome(exact, (0.1,))])
    assert "No row of the exact form is finished" in told


def test_a_figure_from_the_command_line(tmp_path, monkeypatch, capsys):
    tiny = {"data": "digits", "steps": 4, "evaluate_every": 2, "log_every": 2, "width": 8}
    wanted = ("backprop", "exact", "published, N_h = 1", "matched, N_h = 1")
    wanted += tuple(f"{kind}, as above" for kind in ("backprop", "published", "matched"))
    whole = figure2(quick=True)
    rows = tuple(replace(row, settings=replace(row.settings, **tiny)) for row in whole.rows if row.label in wanted)
    monkeypatch.setattr(f"{COMMAND}.figure2", lambda *, seeds, **_: replace(whole, rows=rows, seeds=seeds))
    command = ["figure", "2", "--quick", "--quiet", "--seeds", "3", "--out", str(tmp_path / "f")]
    assert main(command) == 0
    written = sorted(path.name for path in (tmp_path / "f").iterdir())
    names = ("README.md", "figure-2-points.csv", "figure-2-rows.csv", "figure-2.png", "figure-2.svg", "runs")
    assert written == sorted(names)
    assert "    blockprop figure 2 --quick --seeds 3 --out f\n" in (tmp_path / "f/README.md").read_text()
    for path in (tmp_path / "f/runs").rglob("config.json"):
        assert json.loads(path.read_text())["seed"] == 3
    (tmp_path / "f/figure-2.png").unlink()
    (tmp_path / "f/NOTE.md").write_text("Of these runs this is to be known.\n")
    assert main([*command, "--redraw", "--jobs", "2"]) == 0
    told = (tmp_path / "f/README.md").read_text()
    assert "    blockprop figure 2 --quick --seeds 3 --out f\n" in told  # what made the runs
    assert "Of these runs this is to be known." in told
    assert "200 steps" in told
    assert "Over 1 settings" in told  # the same settings stand in two panels
    monkeypatch.setattr(f"{COMMAND}.figure3", lambda *, seeds, **_: replace(whole, name="figure-3", seeds=seeds))
    assert main(["figure", "3", *command[2:]]) == 2
    assert "holds another study" in capsys.readouterr().err
    wider = tuple(replace(row, settings=replace(row.settings, width=9)) for row in rows)
    monkeypatch.setattr(f"{COMMAND}.figure2", lambda *, seeds, **_: replace(whole, rows=wider, seeds=seeds))
    assert main([*command, "--redraw"]) == 2
    assert "other settings" in capsys.readouterr().err
    assert (tmp_path / "f/figure-2.png").exists()


def tiny(study, labels, **more):
    """Rows of a study on digits, a few steps each."""
    small = {"data": "digits", "model": "mlp", "steps": 4, "epochs": None, "width": 8, "depth": 3}
    small |= {"train_size": None, "evaluate_every": 2, "log_every": 2} | more
    rows = [replace(row, settings=replace(row.settings, **small)) for row in study.rows if row.label in labels]
    return replace(study, rows=tuple(rows), seeds=study.seeds[:2])


def test_figure_3_is_drawn_and_told(tmp_path):
    study = tiny(figure3(seeds=(0, 1)), ("backprop", "exact", "λ = 0.001", "matched, λ = 0.001", "K = 3, λ = 1"))
    run_study(study, tmp_path, quiet=True)
    publish(study, tmp_path, "the command")
    told = (tmp_path / "README.md").read_text()
    assert told.count("| matched, λ = 0.001 |") == 2
    assert "K = 2, weight decay" in told and "Unfinished" not in told
    assert (tmp_path / "figure-3.png").stat().st_size > 10_000


def test_the_gap_is_drawn_and_told(tmp_path):
    labels = ("backprop", "exact", "published")
    study = tiny(replace(gap(), rows=gap().rows[:5]), labels, validation=0.2, depth=2)
    run_study(study, tmp_path, quiet=True)
    publish(study, tmp_path, "the command")
    told = (tmp_path / "README.md").read_text()
    assert "in 1 of 1 finished rows." in told
    # exact has backprop's bits, so that both are tuned to the same end of the search
    assert told.count("| 0 | 0 of 2 |") == 1
    assert "15 of them to choose step sizes" in told
    assert (tmp_path / "gap.png").stat().st_size > 10_000


def test_past_backprop_is_drawn_and_told(tmp_path):
    labels = ("backprop", "exact, proximal W-step, μ = 1")
    study = tiny(beyond(quick=True), labels, validation=0.2)
    study = replace(study, seeds=(0, 1))
    run_study(replace(study, rows=study.rows[:3]), tmp_path, quiet=True)
    publish(study, tmp_path, "the command")
    told = (tmp_path / "README.md").read_text()
    assert "**Unfinished**: 3 of 4 rows are there." in told
    [line] = [line for line in told.splitlines() if line.startswith("| batch 128 | exact")]
    assert line.count(" ± ") == 2  # accuracy, and gain seed by seed
    assert (tmp_path / "beyond.png").stat().st_size > 10_000
