"""Which settings go together: what has no effect beside the others, and what excludes each other."""

import math
from typing import TYPE_CHECKING

from blockprop.experiments.optimizers import OptimizerName

if TYPE_CHECKING:
    from blockprop.experiments.settings import Settings

__all__ = ["check", "without_effect"]

_BLOCKPROP_ONLY = (
    "form",
    "penalty",
    "huber",
    "h_steps",
    "h_lr",
    "h_solver",
    "h_momentum",
    "executor",
    "recompute",
    "diagnose_every",
    "schedule",
)
_CACHE_ONLY = ("cache", "cache_dtype", "cache_limit", "refresh", "residual", "replay")
_PIPELINE_ONLY = (
    "feedback",
    "directions",
    "trust",
    "microbatches",
    "latency",
    "latency_chances",
    "lost",
    "copies",
    "prediction",
    "compensation",
    "delay_annealing",
)
_PROCESSES_ONLY = ("policy", "in_flight", "repeats", "newest", "messages", "replicas")
_LOCK_STEP_ONLY = ("latency", "latency_chances", "lost", "copies")


def without_effect(settings: "Settings") -> dict[str, str]:  # noqa: PLR0912 - a table in words
    """Settings that have no effect beside the others, changed or not, and why."""
    found: dict[str, str] = {}
    if not settings.text:
        found["context"] = "is of text"
    schedule = "sync" if settings.algorithm == "backprop" else settings.who_does_what
    if schedule != "pipelined":
        found |= dict.fromkeys(_PIPELINE_ONLY, "is of --schedule pipelined")
    if schedule != "cached":
        found |= dict.fromkeys(_CACHE_ONLY, "is of --schedule cached")
    if schedule == "sync":
        found |= dict.fromkeys(("curvature", "per_example"), "is of --schedule cached or pipelined")
    elif settings.feedback != "target":
        found |= dict.fromkeys(("curvature", "per_example", "directions", "trust"), "is of --feedback target")
    elif settings.replay:
        reason = "has no place in the published form: leave out --replay, or this"
        found |= dict.fromkeys(("curvature", "per_example", "residual"), reason)
    if settings.algorithm == "backprop":
        found |= dict.fromkeys(_BLOCKPROP_ONLY, "is of blockprop, not of --algorithm backprop")
    else:
        if schedule != "sync":
            found["recompute"] = "is of --schedule sync"
            if settings.executor == "threads":
                found["executor"] = "threads is of --schedule sync"
        if not settings.lost:
            found.setdefault("copies", "is of --lost")
        if not settings.latency:
            found.setdefault("latency_chances", "is of --latency")
        if settings.h_solver != "momentum":
            found["h_momentum"] = f"is of --h-solver momentum, not of {settings.h_solver}"
        if settings.h_solver == "gauss-newton":
            found["h_lr"] = "is of the other h-solvers; gauss-newton has no step size"
    if settings.executor != "processes" or settings.algorithm == "backprop":
        found |= dict.fromkeys(_PROCESSES_ONLY, "is of --executor processes")
    else:
        found |= dict.fromkeys(("recompute", "replay", "residual", "diagnose_every"), "is of one process")
        if settings.policy == "free-running":
            found |= dict.fromkeys(_LOCK_STEP_ONLY, "is of --policy lock-step")
            if schedule == "cached":
                found["newest"] = "is of --schedule pipelined: a cache keeps the feedback of all"
            if schedule == "cached" or settings.feedback == "stashed":
                found["repeats"] = "is of targets at present weights, not of --feedback stashed or --schedule cached"
        else:
            found |= dict.fromkeys(("in_flight", "repeats", "newest"), "is of --policy free-running")
    return found


def check(settings: "Settings", optimizer: OptimizerName) -> None:
    """Raise ValueError where a setting is out of its range, or two exclude each other.

    Args:
        settings: of a run; all of them have an effect.
        optimizer: its own, or the one chosen for its model.
    """
    _check_training(settings, optimizer)
    _check_blocks(settings)
    _check_schedule(settings)
    _check_processes(settings)


def _check_training(settings: "Settings", optimizer: OptimizerName) -> None:
    if settings.epochs is not None and settings.steps is not None:
        raise ValueError("--epochs and --steps are both given; expected one of the two")
    if optimizer == "muon" and settings.momentum:
        raise ValueError("--momentum is of the other optimizers; muon has its own: leave it out")
    if settings.momentum is not None and not 0 <= settings.momentum < 1:
        raise ValueError(f"--momentum is {settings.momentum}; expected a number in [0, 1)")
    if optimizer == "nesterov" and settings.momentum == 0:
        raise ValueError("--momentum is 0, and nesterov is a kind of momentum; expected more, or --optimizer sgd")
    if not 0 <= settings.weight_decay < math.inf:
        raise ValueError(f"--weight-decay is {settings.weight_decay}; expected a finite number of at least 0")
    if settings.trust != "none" and not 0 <= settings.trust < math.inf:
        raise ValueError(f"--trust is {settings.trust}; expected a finite number of at least 0, or none")
    if not 0 <= settings.seed < 2**32:
        raise ValueError(f"--seed is {settings.seed}; expected a whole number from 0 to 2^32 - 1")
    for flag, steps in (("--warmup", settings.warmup), ("--delay-annealing", settings.delay_annealing)):
        if steps is not None and steps < 0:
            raise ValueError(f"{flag} is {steps}; expected a whole number of steps, at least 0")
    if settings.threads is not None and settings.threads < 1:
        raise ValueError(f"--threads is {settings.threads}; expected a whole number of at least 1")
    for flag, rate in (("--lr", settings.lr), *(("--block-lr", rate) for rate in settings.block_lr)):
        if rate is not None and not 0 < rate < math.inf:
            raise ValueError(f"{flag} is {rate}; expected a positive finite step size")


def _check_blocks(settings: "Settings") -> None:
    cuts, blocks = len(settings.split_at), settings.K
    if settings.blocks not in (type(settings)().blocks, blocks):
        raise ValueError(
            f"--split-at names {cuts} cuts, hence {blocks} blocks, but --blocks is {settings.blocks}; leave one of "
            "them out"
        )
    if settings.block_lr and len(settings.block_lr) != blocks:
        raise ValueError(
            f"--block-lr lists {len(settings.block_lr)} step sizes for {blocks} blocks; expected one per block"
        )


def _check_form(settings: "Settings") -> None:
    wanted: tuple[str, ...]
    if settings.executor == "processes":
        where, wanted = "--executor processes", ("exact",)
    elif settings.who_does_what == "pipelined":
        where, wanted = "--schedule pipelined", ("exact",)
    elif settings.who_does_what == "cached":
        where, wanted = ("--replay", ("published",)) if settings.replay else ("--schedule cached", ("exact",))
    else:
        return
    if settings.form not in wanted:
        raise ValueError(f"--form {settings.form} does not go with {where}; expected --form {' or '.join(wanted)}")


def _check_schedule(settings: "Settings") -> None:
    if settings.algorithm == "blockprop":
        _check_form(settings)
    if settings.directions == "both" and settings.curvature != "auto":
        raise ValueError("--directions both measures two curvatures; expected --curvature auto with it")
    if settings.compensation and settings.feedback != "stashed":
        raise ValueError("--compensation corrects gradients at stashed weights; expected --feedback stashed with it")
    if settings.cache_limit is not None and not 0 <= settings.cache_limit < math.inf:
        raise ValueError(f"--cache-limit is {settings.cache_limit}; expected a finite number of GiB, at least 0")
    if settings.who_does_what == "cached" and (settings.text or settings.augmented):
        raise ValueError(
            f"--schedule cached keeps feedback by example, and {settings.data} shows an example differently in every "
            f"epoch; expected a fixed view: {'other data' if settings.text else '--no-augment'}"
        )


def _check_processes(settings: "Settings") -> None:
    bounds = (
        ("--in-flight", settings.in_flight, 1),
        ("--replicas", settings.replicas, 1),
        ("--repeats", settings.repeats, 0),
    )
    for flag, value, least in bounds:
        if value < least:
            raise ValueError(f"{flag} is {value}; expected a whole number of at least {least}")
    if settings.executor != "processes":
        return
    if settings.split_by == "time":
        raise ValueError(
            "--split-by time is measured anew in every process, and the cuts would differ; expected flops or layers, "
            "or --split-at"
        )
    if settings.policy == "free-running" and settings.who_does_what == "sync":
        raise ValueError("--policy free-running has no use for --schedule sync; expected pipelined or cached")
    if settings.who_does_what == "cached" and settings.replicas > 1:
        raise ValueError(
            "--replicas share a batch anew in every epoch, so that a cache would not find its examples; expected "
            "--replicas 1 with --schedule cached"
        )
    for flag, given in (("--repeats", settings.repeats), ("--newest", settings.newest)):
        if given and settings.parts not in (None, 1):
            raise ValueError(f"{flag} is of whole batches; expected --microbatches 1 with it")
    if settings.policy == "free-running" and settings.replicas > 1:
        raise ValueError(
            "--replicas average their gradients at every update, which free-running ones do at different times; "
            "expected --policy lock-step"
        )
