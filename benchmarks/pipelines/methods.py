"""Everything that is compared, by name."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from benchmarks.pipelines import peers, traffic
from benchmarks.pipelines.workloads import Workload

BASE = "one thread"
Learning = Literal["backprop", "large batch", "own", "none"]


@dataclass(frozen=True)
class Peer:
    """One of torch's own ways, or a ceiling.

    Attributes:
        name: in tables and on the command line.
        work: what its processes do; see `peers`.
        settings: for `work`.
        ranks: processes.
        learning: whose curve over examples it has. "backprop" is verified, not trained again; "none" trains nothing.
        linked: whether it talks, so that a slow link matters.
        sent: tensor bytes that leave the lower and the upper process in a step.
    """

    name: str
    work: Callable[[int, dict[str, Any]], Any]
    settings: dict[str, Any]
    ranks: int = 2
    learning: Learning = "backprop"
    linked: bool = True
    sent: tuple[int, int] | None = None


@dataclass(frozen=True)
class Own:
    """One of BlockProp's, as the command line runs it.

    Attributes:
        name: in tables.
        flags: for `blockprop train`, beside the workload's.
        policy: lock-step or free-running.
        recomputes: whether the lower block goes forward twice with every batch, so that its cut is lower.
        quick: whether it is there with `--quick`.
        only_linked: shown over a slow link only.
    """

    name: str
    flags: dict[str, Any]
    policy: str
    recomputes: bool = True
    quick: bool = True
    only_linked: bool = False


_LATE = {"schedule": "pipelined"}
_STASHED = {**_LATE, "feedback": "stashed"}
OWN = (
    Own("BlockProp, lock-step", {**_LATE, "microbatches": 1}, "lock-step"),
    # as many as the command line takes; its lower block goes forward twice with every other microbatch
    Own("BlockProp, lock-step, 2 microbatches", {**_LATE, "microbatches": 2}, "lock-step", recomputes=False),
    Own("BlockProp, lock-step, stashed", {**_STASHED, "microbatches": 1}, "lock-step", recomputes=False, quick=False),
    *(
        Own(
            f"BlockProp, lock-step, stashed, {parts} microbatches",
            {**_STASHED, "microbatches": parts},
            "lock-step",
            recomputes=False,
            quick=False,
        )
        for parts in (2, 4, 8)
    ),
    *(
        Own(
            f"BlockProp, free-running{title}{', int8' * coarse}",
            {**_LATE, "microbatches": parts} | ({"messages": "int8"} if coarse else {}),
            "free-running",
            recomputes=parts == 1,
            quick=not coarse,
            only_linked=coarse,
        )
        for parts, title in ((1, ""), (2, ", 2 microbatches"))
        for coarse in (False, True)
    ),
    Own("BlockProp, cached, E = 2", {"schedule": "cached", "refresh": 2}, "free-running", recomputes=False),
    Own("BlockProp, cached, E = 4", {"schedule": "cached", "refresh": 4}, "free-running", recomputes=False),
)


def own(workload: Workload, *, linked: bool, quick: bool) -> list[Own]:
    """BlockProp's rows of a workload on a link."""
    # over a slow link more batches have to be on their way, so that it is never idle
    return [
        _linked(one) if linked and one.policy == "free-running" else one
        for one in OWN
        if (workload.cached or one.flags["schedule"] != "cached")
        and (one.quick or not quick)
        and (linked or not one.only_linked)
    ]


def _linked(one: Own) -> Own:
    """With so many on their way that a target is late whatever its microbatch, and evaluated again."""
    pipelined = one.flags["schedule"] == "pipelined"
    return replace(one, flags={**one.flags, "in_flight": 4}, recomputes=pipelined)


def all_peers(workload: Workload, facts: dict[str, Any], *, linked: bool, quick: bool) -> list[Peer]:
    """Torch's rows of a workload on a link, and the ceilings, which need no link.

    Args:
        workload: the workload.
        facts: what `prepare` found.
        linked: whether the link is a slow one.
        quick: fewer microbatches.
    """
    apart = {"linked": False}
    found = [
        Peer(BASE, peers.one, {"threads": 1}, 1, **apart),  # type: ignore[arg-type]
        Peer("two threads", peers.one, {"threads": 2}, 1, **apart),  # type: ignore[arg-type]
        Peer("two independent copies", peers.one, {"ranks": 2}, learning="none", **apart),  # type: ignore[arg-type]
        *(
            Peer(
                f"two halves apart, {passes}",
                peers.half,
                {"cut": at, "recompute": again},
                learning="none",
                **apart,  # type: ignore[arg-type]
            )
            for passes, at, again in (
                ("3 passes below", workload.cut, False),
                ("4 passes below", workload.recomputing_cut, True),
            )
        ),
        Peer("DDP", peers.ddp, {}, sent=(traffic.data_parallel(facts["weights"]),) * 2),
    ]
    counts = {
        "gpipe": (4,) if quick else (2, 4, 8),
        "1f1b": (2, 4) if quick else (2, 4, 8),
        "zbv": (4,) if quick else (2, 4, 8),
    }
    titles = {"gpipe": "GPipe", "1f1b": "1F1B", "zbv": "ZBV"}
    found += [_pipeline(workload, facts, f"{titles[name]}, {m}", name, m) for name in counts for m in counts[name]]
    large = workload.large
    found.append(_pipeline(workload, facts, f"1F1B, {large} x {workload.batch}", "1f1b", large, many=large))
    return [one for one in found if one.linked or not linked or one.name == BASE]


def _pipeline(workload: Workload, facts: dict[str, Any], title: str, name: str, count: int, many: int = 1) -> Peer:
    cuts = workload.four if name == "zbv" else (workload.cut,)
    crossing = [facts["boundaries"][at] for at in (workload.four[0], workload.four[2])]
    if name != "zbv":
        crossing = [facts["boundaries"][workload.cut]]
    # ZBV's lower process has the first and the last stage: it sends one boundary up, and the other one's gradient
    each = traffic.pipeline(workload.batch * many, crossing)
    settings = {"schedule": name, "microbatches": count, "many": many, "cuts": list(cuts)}
    learning: Learning = "backprop" if many == 1 else "large batch"
    return Peer(title, peers.pipeline, settings, learning=learning, sent=(each, each))
