"""The training loop: what it counts, what it writes, and a resume that continues bit for bit."""

import json

import pytest
import torch
from torch import nn

import blockprop
from blockprop.checkpoint import Checkpoints
from blockprop.data import Dataset
from blockprop.metrics import Metrics, read_metrics
from blockprop.training import Training, score


def dataset(n=50):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 6, generator=generator)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    return Dataset.from_tensors((x, y), (x[:20], y[:20]), validation=0.2)


def algorithm(make=blockprop.BlockProp, dropout=0.3, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    )
    return make(
        blockprop.split(model, 3),
        nn.CrossEntropyLoss(),
        lambda p: torch.optim.AdamW(p, 1e-2),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20),
        **settings,
    )


def test_it_learns_and_counts():
    algo = algorithm(dropout=0.0)
    training = Training(algo, dataset(), batch_size=16, epochs=20)
    before = score(algo, training.dataset.train)
    training.run()
    after = score(algo, training.dataset.train)
    assert training.step == 20 * 3
    assert training.samples == 20 * 40
    assert after.loss < 0.5 * before.loss
    assert after.accuracy > 0.8


def test_score_is_the_mean_over_all_examples_whatever_the_batch():
    algo, data = algorithm(), dataset()
    whole = score(algo, data.train, batch_size=1000)
    parts = score(algo, data.train, batch_size=7)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert parts.accuracy == whole.accuracy


@pytest.mark.parametrize("stop", [1, 4, 7, 12])
@pytest.mark.parametrize("make", [blockprop.BlockProp, blockprop.Backprop])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, stop, make, accumulate):
    def training(folder, steps, **more):
        return Training(
            algorithm(make, accumulate=accumulate),
            dataset(),
            batch_size=16,
            steps=steps,
            log_every=2,
            metrics=Metrics(folder / "metrics.jsonl"),
            checkpoints=Checkpoints(folder),
            **more,
        )

    whole = training(tmp_path / "whole", 13)
    whole.run()
    first = training(tmp_path / "parts", stop, checkpoint_every=1)
    first.run()
    torch.manual_seed(999)  # whatever the new process did before
    second = training(tmp_path / "parts", 13)
    second.resume(second.checkpoints.newest())
    second.run()
    for name, value in whole.algo.blocks.model.state_dict().items():
        assert torch.equal(value, second.algo.blocks.model.state_dict()[name]), name
    assert whole.last_epoch == second.last_epoch

    def last_rows(folder):
        rows = read_metrics(tmp_path / folder / "metrics.jsonl")
        return [{k: v for k, v in row.items() if "second" not in k} for row in rows if row["step"] > stop + 2]

    assert last_rows("whole") == last_rows("parts")


def test_metrics_hold_training_validation_and_diagnostics(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    Training(algorithm(), dataset(), batch_size=16, epochs=2, metrics=metrics, log_every=1, diagnose_every=3).run()
    metrics.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    kinds = {kind: [row for row in rows if row["kind"] == kind] for kind in ("train", "validation", "diagnostics")}
    assert [row["step"] for row in kinds["train"]] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in kinds["validation"]] == [1, 2]
    assert len(kinds["train"][0]["gluing_loss"]) == 2
    assert min(kinds["diagnostics"][0]["cosine"]) > 0.999
    assert len(kinds["diagnostics"][0]["curvature"]) == 2


def test_evaluation_on_the_test_part(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    training = Training(algorithm(), dataset(), batch_size=16, epochs=1, metrics=metrics, evaluate_on="test")
    training.run()
    metrics.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in rows} == {"train", "test"}
    assert training.score == score(training.algo, training.dataset.test)


def test_diagnostics_do_not_change_the_run():
    states = []
    for every in (0, 1):
        training = Training(algorithm(), dataset(), batch_size=16, steps=5, diagnose_every=every)
        training.run()
        states.append(training.algo.blocks.model.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_a_diverging_run_stops_and_keeps_its_checkpoint(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    algo = blockprop.BlockProp(blockprop.split(model, 2), nn.MSELoss(), lambda p: torch.optim.SGD(p, lr=1e12))
    x = torch.randn(40, 6)
    data = Dataset.from_tensors((x, torch.randn(40, 4)), (x, torch.randn(40, 4)), validation=0.0)
    training = Training(algo, data, batch_size=8, epochs=9, checkpoints=Checkpoints(tmp_path), checkpoint_every=1)
    with pytest.raises(ValueError, match="training diverged"):
        training.run()
    assert training.checkpoints.newest()["position"]["step"] == training.step


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 1, "steps": 1}, "both given"),
        ({}, "neither epochs nor steps"),
        ({"epochs": 0}, "epochs is 0"),
        ({"steps": -1}, "steps is -1"),
        ({"epochs": 1, "batch_size": 0}, "batch size is 0"),
        ({"epochs": 1, "log_every": 0}, "log-every is 0"),
        ({"epochs": 1, "diagnose_every": -1}, "diagnose-every is -1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Training(algorithm(), dataset(), **settings)


def test_a_checkpoint_of_another_model_or_other_data_is_refused():
    state = Training(algorithm(), dataset(), batch_size=16, epochs=1).state()
    other = Training(algorithm(), dataset(100), batch_size=16, epochs=1)
    with pytest.raises(ValueError, match="same data and batch size"):
        other.resume(state)
    state["model"]["0.weight"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match="another model: 0.weight"):
        Training(algorithm(), dataset(), batch_size=16, epochs=1).resume(state)
    with pytest.raises(ValueError, match="lacks algorithm"):
        Training(algorithm(), dataset(), batch_size=16, epochs=1).resume({"model": {}})


def test_another_runs_checkpoints_are_not_mixed_with_ones_own(tmp_path):
    first = Training(algorithm(), dataset(), batch_size=16, epochs=2, checkpoints=Checkpoints(tmp_path))
    first.run()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    second = Training(algorithm(), dataset(), batch_size=16, epochs=1, checkpoints=Checkpoints(tmp_path))
    with pytest.raises(ValueError, match="already holds checkpoints up to step-00000006"):
        second.run()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((nn.Linear(2, 2), dataset()), {}, "algo is a Linear"),
        ((algorithm(), (1, 2)), {}, "dataset is a tuple"),
        ((algorithm(), dataset()), {"metrics": "a.jsonl"}, "metrics is a str"),
        ((algorithm(), dataset()), {"checkpoints": "a"}, "checkpoints is a str"),
    ],
)
def test_things_of_another_kind(arguments, settings, message):
    with pytest.raises(ValueError, match=message):
        Training(*arguments, epochs=1, **settings)
