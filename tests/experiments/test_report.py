"""Reports: what is put together, under which label, and that long labels fit."""

import json
import shutil
import warnings

import pytest

from blockprop.cli import main
from blockprop.experiments.report import find_runs, groups, markdown, plot
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


def test_a_copy_of_a_run_is_no_further_seed(tmp_path):
    shutil.copytree(finished(tmp_path / "a", seed=0), tmp_path / "copy of a")
    finished(tmp_path / "b", seed=0, summary={"samples_per_second": 99.0})  # made again
    finished(tmp_path / "c", seed=1)
    assert labels(tmp_path) == {"blockprop exact": 3}


def test_a_label_names_what_was_set_and_has_a_value(tmp_path):
    finished(tmp_path / "a")
    finished(tmp_path / "b", clip=1.0)
    finished(tmp_path / "c", block_lr=(0.1, 0.05))
    finished(tmp_path / "d", model="resnet18")  # with another width, step size and momentum of its own
    finished(tmp_path / "e", algorithm="backprop")
    assert set(labels(tmp_path)) == {
        "backprop",
        "blockprop exact",
        "blockprop exact clip=1",
        "blockprop exact block-lr=0.1,0.05",
        "blockprop exact model=resnet18",
    }


def test_a_setting_without_effect_is_not_told(tmp_path):
    finished(tmp_path / "a", schedule="cached", refresh=4)
    finished(tmp_path / "b", schedule="cached")
    finished(tmp_path / "c")
    assert set(labels(tmp_path)) == {
        "blockprop exact schedule=cached refresh=4",
        "blockprop exact schedule=cached refresh=2",
        "blockprop exact schedule=sync",
    }


def test_one_or_two_settings_that_differ_are_told_of_all(tmp_path):
    finished(tmp_path / "a", blocks=2, depth=4)
    finished(tmp_path / "b", blocks=4, depth=4)
    finished(tmp_path / "c", algorithm="backprop", depth=4)
    assert set(labels(tmp_path)) == {"backprop", "blockprop exact blocks=2", "blockprop exact blocks=4"}
    finished(tmp_path / "d", blocks=4, depth=4, batch_size=32)
    assert "blockprop exact blocks=2 batch-size=64" in labels(tmp_path)


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


def test_every_data_set_has_a_table_and_a_plot_of_its_own(tmp_path, capsys):
    finished(tmp_path / "a", data="digits")
    finished(tmp_path / "b", data="mnist", form="published")
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "r")]) == 0
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == [
        "comparison-digits.md",
        "comparison-digits.png",
        "comparison-mnist.md",
        "comparison-mnist.png",
    ]
    tables = [(tmp_path / f"r/comparison-{data}.md").read_text() for data in ("digits", "mnist")]
    assert "exact" in tables[0] and "published" not in tables[0]
    assert "published" in tables[1] and "exact" not in tables[1]
    printed = capsys.readouterr().out
    assert "mlp, digits, K = 2" in printed and "mlp, mnist, K = 2" in printed


def test_several_folders_are_not_written_into(tmp_path, capsys):
    folders = [str(finished(tmp_path / name)) for name in ("a", "b")]
    assert main(["report", *folders]) == 2
    assert "report of 2 folders needs --out" in capsys.readouterr().err
    assert not list(tmp_path.rglob("comparison*"))
    assert main(["report", folders[0]]) == 0
    assert (tmp_path / "a/comparison.md").exists()


def test_figures_that_were_not_finite_are_shown_as_such(tmp_path):
    row = {"kind": "train", "step": 1, "epoch": 1.0, "loss": None}
    for seed, gluing in ((0, [0.1, None]), (1, [0.3, 2.0])):
        folder = finished(tmp_path / str(seed), seed=seed, summary={"gluing_loss": gluing, "test_loss": None})
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    made = groups(find_runs([tmp_path]))
    assert "| - | 0.2, nan |" in markdown(made)
    plot(made, tmp_path / "plot.png", "")


@pytest.mark.parametrize("many", [1, 3, 20])
def test_long_labels_fit_into_the_plot(tmp_path, many):
    for index in range(many):
        rates = tuple(0.1 + index / 1000 + k / 100 for k in range(20))
        finished(
            tmp_path / str(index),
            **{"form": "proximal", "h_solver": "momentum", "h_steps": 2 + index, "dropout": 0.1, "blocks": 20},
            **{"depth": 20, "block_lr": rates, "clip": 1.0 + index, "weight_decay": 0.1 * index},
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns where labels leave no room for the axes
        plot(groups(find_runs([tmp_path])), tmp_path / "r/plot.png", "a title " * 40)
    png = (tmp_path / "r/plot.png").read_bytes()
    width, height = (int.from_bytes(png[at : at + 4]) for at in (16, 20))
    assert width == 13 * 130
    assert height < 25 * 130
