import json
import time

import pytest

from blockprop.experiments.progress import SweepProgress
from blockprop.experiments.settings import Settings


def test_the_time_left_is_by_what_the_runs_of_the_same_row_took(capsys):
    with SweepProgress("study", {"short": 3, "long": 2, "unknown": 1}, jobs=2) as progress:
        assert progress.seconds_left() == 0  # nothing is known yet
        progress.finished("short", 10.0, "short, seed 0: done")
        assert progress.seconds_left() == pytest.approx((2 + 2 + 1) * 10 / 2)
        progress.finished("long", 100.0, "long, seed 0: done")
        assert progress.seconds_left() == pytest.approx((2 * 10 + 100 + 55) / 2)
        progress.finished("long", 200.0, "long, seed 1: done")
    assert "3/6 long, seed 1: done (62 s left)" in capsys.readouterr().err


def test_before_a_run_has_ended_the_time_left_is_by_how_far_those_are_that_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("blockprop.experiments.progress._LOOK", 0.01)
    monkeypatch.setattr("blockprop.experiments.progress._SAY", 0.02)
    row = {"step": 25, "epoch": 0.5, "seconds": 10.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    for settings, whole in ((Settings(steps=100), 40), (Settings(epochs=2), 40)):
        with SweepProgress("study", {"one": 3, "other": 1}, jobs=2) as progress:
            progress.started("one", "one, seed 0", tmp_path, settings)
            progress.started("other", "other, seed 0", tmp_path / "nothing yet", settings)
            assert progress.seconds_left() == pytest.approx((4 * whole - 10) / 2)
            time.sleep(0.2)
            progress.finished("one", 60.0, "one, seed 0: done", tmp_path)
            assert progress.seconds_left() == pytest.approx((2 * 60 + 60) / 2)
    assert "going on: one, seed 0 25%, other, seed 0 0% (75 s left)" in capsys.readouterr().err
