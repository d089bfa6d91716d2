"""Settings: what stands for a choice is recorded as chosen, once and for all."""

from dataclasses import replace

import pytest
import torch

from blockprop.experiments.settings import Settings


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ({}, {"model": "mlp", "width": 300, "depth": 2, "augment": False, "h_lr": 0.5, "epochs": 30, "lr": 0.1}),
        ({"penalty": (4.0,)}, {"h_lr": 0.125}),
        ({"penalty": (1.0, 2.0), "blocks": 3, "depth": 3}, {"h_lr": None}),
        ({"form": "published"}, {"h_lr": 0.01}),
        ({"form": "published", "h_steps": 3}, {"h_lr": 0.5}),
        ({"form": "rescaled", "penalty": (0.5,)}, {"h_lr": 0.1}),
        ({"form": "proximal", "h_solver": "backtracking"}, {"h_lr": 0.5}),
        ({"form": "proximal", "h_solver": "gauss-newton"}, {"h_lr": None}),
        ({"data": "cifar10", "model": "resnet18"}, {"augment": True, "width": 64, "depth": None, "momentum": 0.9}),
        ({"data": "shakespeare"}, {"model": "gpt", "width": 96, "depth": 6, "optimizer": "adamw"}),
        ({"data": "some/book"}, {"model": "gpt"}),
        ({"width": 7, "augment": False, "h_lr": 0.5, "threads": 3}, {"width": 7, "threads": 3}),
        ({"steps": 5}, {"epochs": None, "steps": 5}),
        ({"optimizer": "adam"}, {"lr": 1e-3, "momentum": 0.9}),
        ({"split_at": ("layer2", "layer3"), "depth": 3}, {"blocks": 3}),
    ],
)
def test_what_is_left_to_choose_is_chosen_once(given, chosen):
    resolved = Settings(**given).resolved()
    assert {key: getattr(resolved, key) for key in chosen} == pytest.approx(chosen)
    assert resolved.threads == given.get("threads", torch.get_num_threads())
    assert resolved.resolved() == resolved


def test_a_default_and_the_same_value_given_are_equal():
    given = Settings(model="mlp", width=300, depth=2, augment=False, h_lr=0.5, threads=torch.get_num_threads())
    assert given.resolved() == Settings().resolved()


@pytest.mark.parametrize(
    ("given", "unused"),
    [
        ({}, []),
        ({"algorithm": "backprop"}, []),
        ({"algorithm": "backprop", "lr": 0.2, "blocks": 4, "clip": 1.0, "devices": ("cpu",)}, []),
        ({"context": 8}, ["context"]),
        ({"context": 8, "data": "shakespeare"}, []),
        ({"algorithm": "backprop", "form": "published"}, ["form"]),
        ({"algorithm": "backprop", "penalty": (10.0,), "huber": 1.0}, ["penalty", "huber"]),
        ({"algorithm": "backprop", "h_solver": "momentum", "h_momentum": 0.9}, ["h_solver", "h_momentum"]),
        ({"algorithm": "backprop", "executor": "threads", "recompute": True}, ["executor", "recompute"]),
        ({"algorithm": "backprop", "diagnose_every": 5}, ["diagnose_every"]),
        ({"h_momentum": 0.9}, ["h_momentum"]),
        ({"form": "proximal", "h_solver": "momentum", "h_momentum": 0.9}, []),
        ({"form": "proximal", "h_solver": "gauss-newton", "h_lr": 0.1}, ["h_lr"]),
        ({"form": "proximal", "h_solver": "backtracking", "h_lr": 0.1}, []),
    ],
)
def test_what_has_no_effect_is_named_and_goes_back_to_its_default(given, unused):
    settings = Settings(**given)
    assert list(settings.unused()) == unused
    assert all("\n" not in why and f"--{key.replace('_', '-')} " in why for key, why in settings.unused().items())
    kept = {key: value for key, value in given.items() if key not in unused}
    assert settings.resolved() == Settings(**kept).resolved()
    assert not settings.resolved().unused()


def test_older_pipelines_had_no_limit_on_the_correction():
    recorded = Settings(schedule="pipelined").resolved().as_dict()
    del recorded["trust"]
    assert Settings.of_dict(recorded).trust == "none"
    for other in (Settings(), Settings(schedule="pipelined", feedback="gradient")):
        recorded = other.resolved().as_dict()
        del recorded["trust"]
        assert Settings.of_dict(recorded) == other.resolved()


def test_feedback_is_sent_twice_where_some_is_lost():
    settings = Settings(schedule="pipelined", lost=0.05)
    assert (settings.resolved().copies, settings.messages_late.times) == (2, 2)
    assert replace(settings, copies=1).messages_late.times == 1
    for other in (Settings(schedule="pipelined"), Settings(schedule="pipelined", copies=1)):
        assert (other.resolved().copies, other.messages_late.times) == (None, 1)


def test_older_free_running_runs_had_whole_batches():
    settings = Settings(schedule="pipelined", executor="processes", policy="free-running", blocks=3).resolved()
    assert Settings.of_dict(settings.as_dict()).resolved().microbatches == 4
    assert Settings.of_dict({**settings.as_dict(), "microbatches": None}).resolved().microbatches == 1


@pytest.mark.parametrize(("in_flight", "passes"), [(1, [3.5, 3, 3]), (2, [4, 3.5, 3]), (4, [4, 4, 3])])
def test_a_block_evaluates_again_what_an_update_may_come_between(in_flight, passes):
    settings = Settings(executor="processes", schedule="pipelined", policy="free-running", blocks=3, microbatches=2)
    assert replace(settings, in_flight=in_flight).resolved().passes == passes


def test_older_runs_sent_feedback_once():
    recorded = Settings(schedule="pipelined", lost=0.05).resolved().as_dict()
    del recorded["copies"]
    assert Settings.of_dict(recorded).copies == 1


def test_a_first_beta_of_none_stays_one():
    """Processes are given the settings as they are recorded."""
    settings = Settings(optimizer="adamw", momentum=0.0, executor="processes").resolved()
    assert Settings.of_dict(settings.as_dict()) == settings


def test_older_runs_did_not_record_the_first_beta():
    recorded = Settings(optimizer="adamw").resolved().as_dict()
    assert recorded["momentum"] == 0.9
    del recorded["copies"]
    assert Settings.of_dict({**recorded, "momentum": 0.0}) == Settings.of_dict(recorded)
