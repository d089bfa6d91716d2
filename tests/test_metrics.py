"""Metrics: one row a line, that a crash cannot spoil."""

import json

import pytest

from blockprop.metrics import Metrics, read_metrics


def test_rows_come_back(tmp_path):
    metrics = Metrics(tmp_path / "run" / "metrics.jsonl")
    metrics.write("train", 1, {"loss": 0.1 + 0.2, "gluing_loss": [1.0, 2e-9], "accuracy": None, "name": "ü\n"})
    metrics.write("validation", 2, {})
    assert read_metrics(metrics.path) == [
        {"kind": "train", "step": 1, "loss": 0.1 + 0.2, "gluing_loss": [1.0, 2e-9], "accuracy": None, "name": "ü\n"},
        {"kind": "validation", "step": 2},
    ]  # flushed, although not closed
    metrics.close()
    again = Metrics(metrics.path)
    again.write("train", 3, {})
    again.close()
    assert [row["step"] for row in read_metrics(metrics.path)] == [1, 2, 3]
    assert read_metrics(tmp_path / "missing") == []


def test_a_last_line_cut_anywhere_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first, last = ({"kind": "train", "step": step, "loss": 0.5} for step in (1, 2))
    for length in range(len(json.dumps(last))):
        path.write_text(json.dumps(first) + "\n" + json.dumps(last)[:length])
        assert read_metrics(path) == [first]


def test_any_other_cut_line_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON") as caught:
        read_metrics(path)
    assert "\n" not in str(caught.value)


def test_lines_that_are_json_but_no_objects_are_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n[2]\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)


def test_rewinding_forgets_what_came_after(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        metrics.write("train", step, {"loss": 1 / step})
    metrics.path.write_text(metrics.path.read_text() + '{"kind": "tr')
    metrics.rewind(3)
    metrics.write("train", 4, {"loss": "again"})
    metrics.close()
    rows = read_metrics(metrics.path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[2]["loss"] == 1 / 3
    assert rows[3]["loss"] == "again"


def test_writing_on_after_a_crash_does_not_join_two_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "tr')
    metrics = Metrics(path)
    metrics.write("train", 2, {})
    metrics.write("train", 3, {})
    metrics.close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]


def test_tensorboard_gets_the_same_numbers(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    metrics = Metrics(tmp_path / "metrics.jsonl", tensorboard=tmp_path / "board")
    for step in (1, 2):
        metrics.write("train", step, {"loss": 0.5 * step, "gluing_loss": [1.0, 2.0], "accuracy": None})
    metrics.close()
    board = accumulator.EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert sorted(board.Tags()["scalars"]) == ["train/gluing_loss/1", "train/gluing_loss/2", "train/loss"]
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(1, 0.5), (2, 1.0)]
    assert [event.value for event in board.Scalars("train/gluing_loss/2")] == [2.0, 2.0]


def test_a_resumed_run_shows_every_point_in_tensorboard_once(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, last in ((1, 5), (4, 6)):  # stopped after step 5, resumed from step 3
        metrics = Metrics(tmp_path / "metrics.jsonl", tensorboard=tmp_path / "board")
        metrics.rewind(first - 1)
        for step in range(first, last + 1):
            metrics.write("train", step, {"loss": 10.0 * first + step})
        metrics.close()
    board = accumulator.EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    points = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert points == [(1, 11), (2, 12), (3, 13), (4, 44), (5, 45), (6, 46)]
    assert points == [(row["step"], row["loss"]) for row in read_metrics(metrics.path)]


def test_nan_and_infinity_are_written_as_null(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.path.write_text('{"kind": "train", "step": 1, "loss": NaN}\n')  # by an older version
    metrics.write("train", 2, {"loss": float("nan"), "gluing_loss": [1.0, float("inf"), -float("inf")]})
    metrics.rewind(2)
    metrics.write("train", 3, {"loss": 0.5})
    metrics.close()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    rows = [json.loads(line, parse_constant=refuse) for line in metrics.path.read_text().splitlines()]
    assert [row["loss"] for row in rows] == [None, None, 0.5]
    assert rows[1]["gluing_loss"] == [1.0, None, None]


def test_without_tensorboard_the_rows_are_still_written(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    metrics = Metrics(tmp_path / "metrics.jsonl", tensorboard=tmp_path / "board")
    metrics.write("train", 1, {"loss": 1.0})
    metrics.close()
    assert len(read_metrics(metrics.path)) == 1
    assert not (tmp_path / "board").exists()
