"""Runs by a schedule from the command line: every option trains, resumes to the same bytes, and says its mistakes."""

import json
import shutil
from unittest.mock import Mock

import pytest

from blockprop.cli import main
from blockprop.experiments.execution import executor_of
from blockprop.experiments.settings import Settings

QUICK = ["--data", "digits", "--width", "16", "--depth", "4", "--blocks", "3", "--quiet", "--threads", "1"]
PIPELINED, CACHED = ["--schedule", "pipelined"], ["--schedule", "cached"]


def train(out, *more, steps=30):
    return main(["train", *QUICK, "--steps", str(steps), "--out", str(out), *more])


@pytest.mark.parametrize(
    "more",
    [
        PIPELINED,
        [*PIPELINED, "--curvature", "0.1", "--microbatches", "3"],
        [*PIPELINED, "--feedback", "gradient", "--latency", "4", "--lost", "0.1"],
        [*PIPELINED, "--feedback", "stashed", "--compensation", "0.1", "--delay-annealing", "10"],
        [*PIPELINED, "--prediction", "1", "--optimizer", "nadam"],
        [*PIPELINED, "--optimizer", "muon", "--warmup", "5", "--dropout", "0.2", "--norm", "batch"],
        CACHED,
        [*CACHED, "--refresh", "3", "--cache-dtype", "int8", "--curvature", "0.1"],
        [*CACHED, "--replay", "--form", "published"],
    ],
)
def test_a_scheduled_run_resumed_is_the_one_that_was_not_stopped(tmp_path, more):
    assert train(tmp_path / "whole", *more, "--checkpoint-every", "13") == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    for path in (tmp_path / "stopped/checkpoints").iterdir():
        if not path.name.endswith("26.safetensors"):
            path.unlink()
    (tmp_path / "stopped/summary.json").unlink()
    (tmp_path / "stopped/model.safetensors").unlink()
    assert main(["train", "--resume", "--quiet", "--out", str(tmp_path / "stopped")]) == 0
    whole, stopped = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert whole == stopped


@pytest.mark.parametrize("more", [PIPELINED, [*PIPELINED, "--latency", "2", "--lost", "0.1", "--copies", "2"], CACHED])
def test_a_finished_run_is_continued(tmp_path, more):
    assert train(tmp_path / "run", *more) == 0
    assert main(["train", "--resume", "--steps", "45", "--quiet", "--out", str(tmp_path / "run")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"][-1] == 45
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 45


def test_a_warm_up_is_given_in_steps_also_where_gradients_accumulate(tmp_path):
    more = ["--warmup", "20", "--accumulate", "4", "--log-every", "4", "--lr", "0.1"]
    assert train(tmp_path / "run", *more, steps=40) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rates = {row["step"]: row["lr"][0] for row in rows if row["kind"] == "train"}
    assert rates[4] < rates[12] < 0.1
    assert rates[20] == rates[40] == 0.1


def test_what_is_changed_in_a_run_is_checked(tmp_path, capsys):
    assert train(tmp_path / "run") == 0
    before = (tmp_path / "run/config.json").read_bytes()
    resumed = ["train", "--resume", "--out", str(tmp_path / "run"), "--steps", "45", "--quiet", "--threads", "0"]
    assert main(resumed) == 2
    assert "--threads is 0" in capsys.readouterr().err
    assert (tmp_path / "run/config.json").read_bytes() == before


@pytest.mark.parametrize("option", ["--epochs", "--width", "--train-size"])
def test_a_figure_of_nothing_is_refused(tmp_path, capsys, option):
    assert main(["figure", "3", option, "0", "--quick", "--out", str(tmp_path / "figure")]) == 2
    assert f"{option} is 0" in capsys.readouterr().err


def test_a_cache_in_a_folder_gives_the_numbers_of_one_in_memory(tmp_path):
    for name, where in (("memory", "memory"), ("mapped", str(tmp_path / "cache"))):
        assert train(tmp_path / name, *CACHED, "--cache", where, steps=50) == 0
    memory, mapped = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("memory", "mapped"))
    assert memory == mapped


def test_the_residual_refreshes_a_cache_ahead_of_its_time(tmp_path):
    age = {}
    for name, more in (("visits", []), ("residual", ["--residual", "0.01"])):
        assert train(tmp_path / name, *CACHED, "--refresh", "9", "--log-every", "30", *more, steps=60) == 0
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        age[name] = [row for row in rows if row["kind"] == "train"][-1]["age"]
    assert all(one < other for one, other in zip(age["residual"], age["visits"], strict=True))


def test_the_first_epoch_of_a_cache_and_refresh_1_are_sync(tmp_path):
    for name, more in (("sync", []), ("every", [*CACHED, "--refresh", "1"])):
        assert train(tmp_path / name, *more, steps=50) == 0
    sync, every = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("sync", "every"))
    assert sync == every


def test_age_and_drift_are_in_the_metrics(tmp_path):
    assert train(tmp_path / "run", *PIPELINED, "--microbatches", "1", "--log-every", "10") == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["kind"] == "train"][-1]
    assert last["age"] == [4.0, 2.0]
    assert all(value > 0 for value in last["drift"])
    assert all(value > 0 for value in last["curvature"])
    assert all(0 <= value <= 1 for value in last["limited"])


def test_what_was_chosen_is_recorded(tmp_path):
    assert train(tmp_path / "run", *PIPELINED, "--batch-size", "12") == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["microbatches"] == 3  # 2(K - 1) = 4 would leave fewer than four examples
    assert train(tmp_path / "cached", *CACHED) == 0
    assert json.loads((tmp_path / "cached/config.json").read_text())["cache"] == "memory"


@pytest.mark.parametrize(
    ("more", "microbatches"),
    [
        ({"blocks": 8}, 14),
        ({"blocks": 8, "batch_size": 32}, 8),
        ({"blocks": 8, "batch_size": 32, "data": "shakespeare"}, 14),
        ({"blocks": 8, "batch_size": 64, "data": "cifar10", "model": "resnet18"}, 8),
        ({"blocks": 8, "batch_size": 48, "norm": "batch"}, 6),
        ({"blocks": 8, "batch_size": 96, "norm": "batch", "executor": "processes", "replicas": 2}, 6),
        ({"blocks": 4, "latency": 3}, 15),
        ({"blocks": 4, "microbatches": 3}, 3),
        ({"split_at": ("layer2", "layer3"), "depth": 3}, 4),
        ({"blocks": 4, "executor": "processes", "policy": "free-running"}, 6),
        ({"blocks": 4, "executor": "processes", "policy": "free-running", "repeats": 2}, 1),
        ({"blocks": 4, "executor": "processes", "policy": "free-running", "newest": True}, 1),
    ],
)
def test_a_batch_has_as_many_microbatches_as_there_are_ticks_until_feedback(more, microbatches):
    assert Settings(schedule="pipelined", **more).resolved().microbatches == microbatches


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--curvature", "1"], "--curvature is of --schedule cached or pipelined"),
        (["--feedback", "gradient"], "--feedback is of --schedule pipelined"),
        (["--refresh", "3"], "--refresh is of --schedule cached"),
        ([*CACHED, "--lost", "0.5"], "--lost is of --schedule pipelined"),
        ([*PIPELINED, "--copies", "2"], "--copies is of --lost"),
        ([*PIPELINED, "--lost", "0.5", "--copies", "0"], "copies of the feedback are 0"),
        ([*PIPELINED, "--cache", "memory"], "--cache is of --schedule cached"),
        ([*PIPELINED, "--recompute"], "--recompute is of --schedule sync"),
        ([*PIPELINED, "--feedback", "gradient", "--curvature", "1"], "--curvature is of --feedback target"),
        ([*PIPELINED, "--lost", "1.5"], "share of lost messages is 1.5"),
        ([*PIPELINED, "--latency", "-1"], "longest delay is -1"),
        ([*PIPELINED, "--microbatches", "0"], "microbatches is 0"),
        (["--warmup", "-1"], "--warmup is -1"),
        ([*PIPELINED, "--delay-annealing", "-1"], "--delay-annealing is -1"),
        ([*PIPELINED, "--curvature", "-1"], "curvature is -1"),
        ([*PIPELINED, "--curvature", "1", "--directions", "both"], "expected --curvature auto"),
        (["--schedule", "pipelined", "--compensation", "1"], "expected --feedback stashed"),
        ([*PIPELINED, "--form", "published"], "expected --form exact"),
        ([*PIPELINED, "--form", "proximal", "--h-steps", "2"], "expected --form exact"),
        (["--executor", "processes", "--form", "proximal", "--huber", "1"], "expected --form exact"),
        ([*CACHED, "--form", "published"], "expected --form exact"),
        ([*CACHED, "--replay"], "expected --form published"),
        ([*CACHED, "--cache-limit", "inf"], "--cache-limit is inf"),
        ([*CACHED, "--cache-limit", "-1"], "--cache-limit is -1"),
        ([*CACHED, "--refresh", "0"], "refresh is 0"),
        ([*CACHED, "--residual", "-1"], "residual is -1"),
        ([*CACHED, "--residual", "1", "--replay", "--form", "published"], "--residual has no place in the published"),
        ([*CACHED, "--residual", "1", "--executor", "processes"], "--residual is of one process"),
        ([*CACHED, "--cache-limit", "0.000001"], "the cache needs"),
        (["--algorithm", "backprop", *PIPELINED], "--schedule is of blockprop"),
        ([*CACHED, "--augment"], "--no-augment"),
    ],
)
def test_mistakes(tmp_path, capsys, more, message):
    assert train(tmp_path / "run", *more) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run/summary.json").exists()


def test_a_run_that_goes_on_longer_keeps_its_warm_up(tmp_path):
    out = tmp_path / "run"
    assert train(out, "--schedule", "pipelined", "--checkpoint-every", "20", steps=40) == 0
    assert json.loads((out / "config.json").read_text())["warmup_steps"] == 4
    more = ["--steps", "1000", "--log-every", "10"]  # a tenth of which is 100
    assert main(["train", "--resume", "--out", str(out), *more, "--quiet"]) == 0
    assert json.loads((out / "config.json").read_text())["warmup_steps"] == 4
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {row["lr"][0] for row in rows if row["kind"] == "train" and row["step"] > 40} == {0.1}


def test_the_schedule_is_drawn_and_listed(capsys):
    assert main(["schedule", "--blocks", "3", "--ticks", "5", "--draw"]) == 0
    drawn = capsys.readouterr().out
    assert drawn.splitlines()[0].startswith("block 3 |        |        | 0 '0*")
    assert main(["schedule", "sequential", "--blocks", "2", "--ticks", "4"]) == 0
    assert "3: backward 0 by 1, update 0 by 1, update 0 by 2" in capsys.readouterr().out
    assert main(["schedule", "--latency", "3", "--microbatches", "15"]) == 0
    assert capsys.readouterr().out.endswith("\nticks in which the first block takes a batch in: 80%\n")
    assert main(["schedule", "parallel", "--latency", "2"]) == 2
    assert main(["schedule", "--ticks", "0"]) == 2
    assert main(["schedule", "--blocks", "0"]) == 2


def test_alignment_with_todays_gradient_is_in_the_metrics(tmp_path):
    assert train(tmp_path / "run", *PIPELINED, "--microbatches", "1", "--diagnose-every", "10") == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    found = [row for row in rows if row["kind"] == "diagnostics"]
    assert len(found) == 3
    assert all(len(row["cosine"]) == len(row["norm_ratio"]) == 3 for row in found)
    assert all(0.3 < cosine <= 1 + 1e-9 for row in found for cosine in row["cosine"])


@pytest.mark.parametrize("schedule", [PIPELINED, CACHED])
def test_staleness_is_drawn(tmp_path, schedule):
    """Age, drift and alignment have panels of their own in the report, and only where feedback was late."""
    assert train(tmp_path / "sync") == 0
    assert main(["report", str(tmp_path / "sync")]) == 0
    without = plotted(tmp_path / "sync")
    assert train(tmp_path / "late", *schedule, "--diagnose-every", "7") == 0
    assert main(["report", str(tmp_path / "late")]) == 0
    assert plotted(tmp_path / "late") > without


def plotted(folder):
    """The height of a comparison's picture, from the PNG's header."""
    return int.from_bytes((folder / "comparison.png").read_bytes()[20:24], "big")


@pytest.mark.parametrize("policy", ["lock-step", "free-running"])
@pytest.mark.parametrize("more", [{}, {"curvature": 0.3}, {"feedback": "gradient"}])
def test_every_feedback_goes_with_a_cache_in_processes(policy, more):
    """An executor is made; of cached feedback κ is along its slope, whoever says it."""
    settings = Settings(data="digits", schedule="cached", executor="processes", policy=policy, **more).resolved()
    executor = executor_of(settings, 10, Mock(blocks=2))
    assert executor.correction.along
