import pytest

from blockprop.experiments.progress import SweepProgress


def test_the_time_left_is_by_what_the_runs_of_the_same_row_took(capsys):
    with SweepProgress("study", {"short": 3, "long": 2, "unknown": 1}, jobs=2) as progress:
        assert progress.seconds_left() == 0  # nothing is known yet
        progress.finished("short", 10.0, "short, seed 0: done")
        assert progress.seconds_left() == pytest.approx((2 + 2 + 1) * 10 / 2)
        progress.finished("long", 100.0, "long, seed 0: done")
        assert progress.seconds_left() == pytest.approx((2 * 10 + 100 + 55) / 2)
        progress.finished("long", 200.0, "long, seed 1: done")
    assert "3/6 long, seed 1: done (62 s left)" in capsys.readouterr().err
