"""Who carries out a run's schedule: its executor, with cache, late feedback and messages as the settings have them."""

import math
import sys
from pathlib import Path
from typing import Any

import torch

from blockprop.cache import GluingCache
from blockprop.correction import Correction
from blockprop.curvature import Constant, Curvature, PerExample, Secant
from blockprop.executors import CachedExecutor, Executor, PipelinedExecutor, ReplayedExecutor
from blockprop.experiments.settings import Settings
from blockprop.runtime import FreeRunningExecutor, Neighbours
from blockprop.schedules import sequential

__all__ = ["executor_of"]


def executor_of(settings: Settings, examples: int, remote: Neighbours | None = None) -> str | Executor:
    """Who carries out the schedule, on so many training examples.

    Args:
        settings: of the run, resolved.
        examples: in the training set.
        remote: the other processes, for the executor "processes".

    Raises:
        ValueError: a cache that cannot be made.
    """
    if settings.executor == "processes":
        assert remote is not None
        return _in_processes(settings, examples, remote)
    if settings.who_does_what == "sync":
        return settings.executor
    if settings.who_does_what == "cached" and settings.replay:
        return ReplayedExecutor(_cache(settings, examples), refresh=settings.refresh)
    if settings.who_does_what == "cached":
        when: dict[str, Any] = {"refresh": settings.refresh, "residual": settings.residual}
        return CachedExecutor(_cache(settings, examples), curvature=_curvature(settings), **when)
    return _pipeline(settings)


def _in_processes(settings: Settings, examples: int, remote: Neighbours) -> Executor:
    if settings.who_does_what == "sync":
        return PipelinedExecutor(sequential, curvature=Constant(0.0), remote=remote)
    caching = settings.who_does_what == "cached"
    cached: dict[str, Any] = (
        {"cache": lambda: _cache(settings, examples), "refresh": settings.refresh} if caching else {}
    )
    if settings.policy == "lock-step":
        return _pipeline(settings, remote=remote, **cached)
    bounds: dict[str, Any] = {
        "microbatches": _microbatches(settings),
        "in_flight": settings.in_flight,
        "repeats": settings.repeats,
        "newest": settings.newest,
    }
    return FreeRunningExecutor(remote, correction=_correction(settings), **bounds, **cached)


def _pipeline(settings: Settings, **more: Any) -> PipelinedExecutor:
    latency = settings.messages_late
    return PipelinedExecutor(
        microbatches=_microbatches(settings), latency=latency, correction=_correction(settings), **more
    )


def _microbatches(settings: Settings) -> int:
    return 1 if settings.parts is None else settings.parts


def _curvature(settings: Settings) -> Curvature:
    if settings.feedback != "target":
        return Constant(0.0)
    found = Secant() if settings.curvature == "auto" else Constant(settings.curvature)
    return PerExample(found) if settings.per_example else found


def _correction(settings: Settings) -> Correction:
    # cached feedback is old: κ along its slope counts apart. A κ that is given is for all directions
    directions = "both" if settings.who_does_what == "cached" else settings.directions
    apart = settings.feedback == "target" and settings.curvature == "auto" and directions == "both"
    return Correction(
        curvature=_curvature(settings),
        along=apart or directions == "along" or settings.who_does_what == "cached",
        across=_curvature(settings) if apart else None,
        trust=math.inf if settings.trust == "none" else settings.trust,
        # with a cache a visit has three passes, those with feedback too
        reuse=settings.feedback == "stashed" or settings.who_does_what == "cached",
        prediction=settings.prediction,
        compensation=settings.compensation,
    )


def _cache(settings: Settings, examples: int) -> GluingCache:
    return GluingCache(
        examples,
        path=None if settings.cache in ("none", "memory") else Path(settings.cache),
        dtype=getattr(torch, settings.cache_dtype),
        limit=None if settings.cache_limit is None else int(settings.cache_limit * 2**30),
        # a block that lost its entries would learn nothing until the feedback that all of them wait for
        snapshot=sys.maxsize if settings.executor == "processes" else 2**30,
    )
