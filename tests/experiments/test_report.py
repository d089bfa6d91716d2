"""Reports: what is put together, and under which label."""

import json

import pytest

from blockprop.experiments.report import find_runs, groups
from blockprop.experiments.settings import Settings

NULLS = {"width": None, "depth": None, "augment": None, "h_lr": None, "threads": None}


def finished(folder, *, recorded=None, summary=None, **settings):
    """A finished run's folder, with what is recorded in place of what was resolved."""
    folder.mkdir(parents=True)
    config = {**Settings(**settings).resolved().as_dict(), **(recorded or {})}
    (folder / "config.json").write_text(json.dumps(config))
    figures = {"test_loss": 0.5, "test_accuracy": 0.9, "samples_per_second": 100.0, "gluing_loss": [0.1]}
    (folder / "summary.json").write_text(json.dumps({**figures, **(summary or {})}))
    return folder


def labels(tmp_path):
    return {group.label: len(group.runs) for group in groups(find_runs([tmp_path]))}


def test_a_default_an_explicit_value_and_an_old_null_are_one_group(tmp_path):
    finished(tmp_path / "a", seed=0)
    finished(tmp_path / "b", seed=1, width=300, depth=2, h_lr=0.5)
    finished(tmp_path / "c", seed=2, recorded=NULLS)
    finished(tmp_path / "d", seed=0, width=16)
    assert labels(tmp_path) == {"blockprop exact width=300": 3, "blockprop exact width=16": 1}


def test_a_label_names_what_was_set_and_has_a_value(tmp_path):
    finished(tmp_path / "a")
    finished(tmp_path / "b", clip=1.0)
    finished(tmp_path / "c", block_lr=(0.1, 0.05))
    finished(tmp_path / "d", model="resnet18")  # with another width, step size and momentum of its own
    finished(tmp_path / "e", algorithm="backprop")
    assert set(labels(tmp_path)) == {
        "backprop model=mlp",
        "blockprop exact model=mlp",
        "blockprop exact model=mlp clip=1",
        "blockprop exact model=mlp block-lr=0.1,0.05",
        "blockprop exact model=resnet18",
    }


def test_a_step_size_that_was_set_is_told_of_all(tmp_path):
    finished(tmp_path / "a")
    finished(tmp_path / "b", form="published")
    assert set(labels(tmp_path)) == {"blockprop exact", "blockprop published"}
    finished(tmp_path / "c", form="published", h_lr=0.1)
    assert set(labels(tmp_path)) == {
        "blockprop exact h-lr=0.5",
        "blockprop published h-lr=0.01",
        "blockprop published h-lr=0.1",
    }


@pytest.mark.parametrize("where", [{"threads": 7}, {"log_every": 1}, {"diagnose_every": 5}, {"seed": 9}])
def test_where_and_how_closely_a_run_was_watched_makes_no_difference(tmp_path, where):
    finished(tmp_path / "a")
    finished(tmp_path / "b", **where)
    assert labels(tmp_path) == {"blockprop exact": 2}
