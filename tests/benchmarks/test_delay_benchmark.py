"""benchmarks/delay: what is run, and what is made of the curves."""

import json
from dataclasses import replace

import pytest
from benchmarks.delay import studies, tables
from benchmarks.delay.tasks import ALIKE, BACKPROP, DEFAULT, DELAYED, ONCE, TWICE, WARM_BACKPROP, tasks

from blockprop.studies.study import Outcome

TASKS = {task.name: task for task in tasks(None, quick=False)}
BRIEF = {task.name: task for task in tasks(None, quick=True)}


def outcome(row, folder, losses, *, lr=0.1, diverged=False):
    """A row with one finished run, whose validation losses were these."""
    folder.mkdir(parents=True)
    curve = [{"kind": "validation", "step": step, "epoch": 0.0, "loss": loss} for step, loss in losses.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curve))
    return Outcome(row, lr, {0: {"diverged": diverged}}, {0: folder})


@pytest.mark.parametrize("task", [*TASKS.values(), *BRIEF.values()], ids=lambda task: f"{task.name}-{task.budget}")
def test_all_that_is_run_has_settings_that_go_together(task):
    outcomes = [Outcome(row, 0.1, {}, {}) for row in studies.tuning(task).rows]
    made = [studies.tuning(task), studies.finals(task, outcomes)]
    made += [studies.stable(task)] if "stable" in studies.names(task) else []
    made += [studies.longer(task, outcomes)] if task.long else []
    made += [studies.cached(task)] if task.again else []
    for study in made:
        for row in study.rows:
            row.settings.resolved()


def test_what_waits_for_step_sizes_and_what_does_not():
    task = TASKS["gpt"]
    none = [Outcome(row, None, {}, {}) for row in studies.tuning(task).rows]
    assert [name for name in studies.names(task) if studies.study(name, task, none) is None] == ["finals", "longer"]
    assert studies.names(TASKS["mlp"]) == ["methods", "finals", "stable", "cached"]
    assert studies.names(BRIEF["mlp"]) == ["methods", "finals"]


def test_the_best_three_go_on_and_the_default_under_losses_at_the_step_size_of_backprop(tmp_path):
    task = TASKS["mlp"]
    rows = studies.tuning(task).rows
    losses = {row.label: 1.0 + index / 100 for index, row in enumerate(rows)}
    losses |= {"SpecTrain: weight prediction": 0.2, "DC-ASGD, λ = 0.1": 0.3, "targets, κ = 0.1": 0.4}
    found = [
        outcome(row, tmp_path / str(index), {task.budget: losses[row.label]}, lr=0.05 if row.label == DEFAULT else 0.1)
        for index, row in enumerate(rows)
    ]
    final = [row for row in studies.finals(task, found).rows if row.panel.endswith("K = 8")]
    best = ["SpecTrain: weight prediction", "DC-ASGD, λ = 0.1", "targets, κ = 0.1"]
    assert [row.label for row in final] == [BACKPROP, WARM_BACKPROP, DELAYED, *best, DEFAULT, ALIKE, TWICE, ONCE]
    assert (final[-3].settings.lr, final[-3].settings.latency) == (0.1, 0)
    twice, once = (row.settings for row in final[-2:])
    assert (once.lr, once.latency, once.lost, once.blocks) == (0.1, 3, 0.05, 8)
    assert replace(twice, copies=1) == once
    assert twice.resolved().copies == 2


def test_a_language_model_has_a_layer_for_every_block():
    task = TASKS["gpt"]
    assert [studies.row(task, DEFAULT, blocks).settings.depth for blocks in (2, 4, 8)] == [6, 6, 8]


def test_quality_is_a_median_of_three_at_the_budget(tmp_path):
    task = replace(TASKS["mlp"], settings=replace(TASKS["mlp"].settings, steps=30))
    one = outcome(studies.row(task, BACKPROP, 4), tmp_path / "a", {10: 3.0, 20: 1.0, 30: 2.0, 40: 0.1})
    assert tables.quality(one, task) == [2.0]
    assert tables.steps_to(one, 1.5) == [40]
    assert tables.steps_to(one, 0.5) == [float("inf")]


def test_the_largest_stable_step_size(tmp_path):
    """A run that diverged, or learnt too little, is not stable."""
    task = TASKS["mlp"]
    study = studies.stable(task)
    ends = {BACKPROP: (0.5, 0.4, 0.3), DELAYED: (0.6, 2.3, None)}
    found = [
        outcome(row, tmp_path / f"{row.panel}-{index}", {10: end or 9.9}, lr=row.settings.lr, diverged=end is None)
        for method, losses in ends.items()
        for index, (row, end) in enumerate(
            zip([row for row in study.rows if row.panel == method], losses, strict=False)
        )
    ]
    told = tables.tell_stable(study, found, task).splitlines()
    assert told[2] == "| backprop | 0.500 | 0.400 | 0.300 | 0.2 | 1 |"
    assert told[3] == "| delayed gradient | 0.600 | (2.300) | diverged | 0.05 | 0.25 |"


def test_cached_targets_beside_backprop_seed_by_seed(tmp_path):
    study = studies.cached(TASKS["mlp"])
    assert [row.label for row in study.rows[:4]] == [BACKPROP, "cached, E = 2", "cached, E = 4", "cached, E = 8"]
    assert (study.rows[5].settings.blocks, study.rows[5].settings.refresh) == (4, 2)

    def found(row, accuracies):
        summaries = {seed: {"test_accuracy": accuracy, "test_loss": 0.1} for seed, accuracy in accuracies.items()}
        return Outcome(row, 0.1, summaries, {})

    both = [found(study.rows[0], {0: 0.98, 1: 0.97}), found(study.rows[1], {1: 0.968})]
    told = tables.tell_cached(study, both).splitlines()
    assert told[4] == "| backprop | 97.50 ± 0.71 |  | 0.1000 ± 0.0000 | 2 |"
    assert told[5] == "| cached, E = 2 | 96.80 | -0.20 | 0.1000 | 1 |"
    both[1] = found(study.rows[1], {0: 0.975, 1: 0.968})
    told = tables.tell_cached(study, both).splitlines()
    assert told[5] == "| cached, E = 2 | 97.15 ± 0.49 | -0.35 ± 0.21 | 0.1000 ± 0.0000 | 2 |"


def test_many_steps_beside_backprop_at_its_step_size_with_a_warm_up(tmp_path):
    task = TASKS["resnet"]
    lrs = {WARM_BACKPROP: 0.05, DEFAULT: 0.02}
    study = studies.longer(task, [Outcome(row, lrs.get(row.label, 0.1), {}, {}) for row in studies.tuning(task).rows])
    alike = [row.settings for row in study.rows if row.label == ALIKE]
    assert [(one.lr, one.blocks, one.steps, one.lr_schedule) for one in alike] == [
        (0.05, blocks, 1500, "cosine") for blocks in (2, 4, 8)
    ]
    found = []
    for row, accuracy in ((study.rows[1], 0.66), (study.rows[4], 0.65)):
        one = outcome(row, tmp_path / row.label, {10: 3.0, 20: 1.0, 30: 2.0}, lr=row.settings.lr)
        found.append(replace(one, summaries={0: {"diverged": False, "test_accuracy": accuracy}}))
    told = tables.tell_longer(study, found).splitlines()
    assert told[4] == "| backprop, warm-up | 0.05 | 2.0000 | 66.00 |  | 1 |"
    assert told[5] == "| the default at backprop's step size | 0.05 | 2.0000 | 65.00 | +1.00 | 1 |"
