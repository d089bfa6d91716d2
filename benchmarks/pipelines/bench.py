"""The measurements: samples/s in interleaved rounds, the check of the schedules, and curves to quality."""

import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.pipelines import training
from benchmarks.pipelines.link import Link
from benchmarks.pipelines.methods import BASE, Own, Peer
from benchmarks.pipelines.processes import LOOPBACK, FailedError, Place, run
from benchmarks.pipelines.quality import examples_to, level
from benchmarks.pipelines.training import Trained, train
from benchmarks.pipelines.workloads import Workload, prepare
from blockprop.experiments.settings import Settings

Say = Callable[[str], None]
_FIRST_STEPS, _EPOCH = 12, 16
_TOGETHER = 4  # methods between two turns of one thread


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    Attributes:
        rounds: of all methods in turn.
        seconds: of steps in a turn.
        seeds: of the curves.
        limit: seconds that one process may take in a turn.
    """

    rounds: int
    seconds: float
    seeds: tuple[int, ...]
    limit: float = 150.0


class Bench:
    """One workload, with its model and batches in a file that all processes read; a context.

    Args:
        workload: what is trained.
        extent: how much is measured.
        say: told what is being done.
    """

    def __init__(self, workload: Workload, extent: Extent, say: Say) -> None:
        self.workload, self.extent, self._say = workload, extent, say
        self._folder = tempfile.TemporaryDirectory(prefix="blockprop-pipelines-")
        self._turns = 0
        self.facts = prepare(workload, Path(self._folder.name) / "batches.pt")

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *_ended: object) -> None:
        self._folder.cleanup()

    def rounds(
        self, peers: Sequence[Peer], own: Sequence[Own], link: Link, first: Callable[[], None]
    ) -> dict[str, dict[str, Any]]:
        """Every method in turn, round after round; a method that fails once is left out of later rounds.

        One thread has a turn after every few methods, since all are compared with it: to its median in the round.

        Args:
            peers: rows with torch's own means.
            own: BlockProp's.
            link: between the two processes.
            first: what else is measured, at the beginning of every round.

        Returns:
            For each: samples/s and the ratio to one thread in every round, memory, bytes; or what went wrong.
        """
        found: dict[str, dict[str, Any]] = {one.name: {"rates": [], "ratios": []} for one in (*peers, *own)}
        turns: dict[str, Callable[[], dict[str, Any]]] = {
            one.name: lambda one=one: self._turn(one, link.places) for one in peers
        }
        for one in own:
            turns[one.name] = lambda one=one: self._own_turn(one, link.places, found[one.name]["rates"], base)
        order = list(turns)
        base: list[float] = []
        for turn in range(self.extent.rounds):
            first()
            begin = turn % len(order)
            rates: dict[str, float] = {}
            base.clear()
            for name in _often(order[begin:] + order[:begin]):
                if "failed" in found[name]:
                    continue
                self._say(f"{self.workload.name}, {link.speed.title}, round {turn + 1}: {name}")
                try:
                    answer = turns[name]()
                except FailedError as error:
                    found[name]["failed"] = str(error).splitlines()[0]
                    continue
                rates[name] = answer.pop("rate")
                base += [rates[name]] * (name == BASE)
                found[name] |= answer
            if not base:
                raise FailedError(f"{BASE}: {found[BASE].get('failed')}")
            rates[BASE] = statistics.median(base)
            for name, rate in rates.items():
                found[name]["rates"].append(rate)
                found[name]["ratios"].append(rate / rates[BASE])
        return found

    def verify(self, peer: Peer) -> float:
        """How far a schedule's weights are from one process's after three steps in float64."""
        self._say(f"{self.workload.name}: is the gradient of {peer.name} backprop's?")
        answers = run(peer.work, peer.ranks, self._settings(peer) | {"verify": True}, limit=self.extent.limit)
        return max(answer["difference"] for answer in answers)

    def _settings(self, peer: Peer) -> dict[str, Any]:
        self._turns += 1
        folder = Path(self._folder.name)
        return {
            "file": str(folder / "batches.pt"),
            "meeting": str(folder / f"meeting-{self._turns}"),
            "optimizer": self.workload.optimizer,
            "seconds": self.extent.seconds,
            **peer.settings,
        }

    def _turn(self, peer: Peer, places: Sequence[Place]) -> dict[str, Any]:
        answers = run(peer.work, peer.ranks, self._settings(peer), places=places, limit=self.extent.limit)
        rates = [answer["samples_per_second"] for answer in answers]
        wire = [answer["sent"] for answer in answers]
        return {
            # copies add up; of halves, and of processes that wait for each other, the slower one counts
            "rate": sum(rates) if peer.settings.get("ranks") else min(rates),
            "memory": [answer["memory"] for answer in answers],
            "sent": peer.sent,
            "wire": None if None in wire else wire,
        }

    def _own_turn(
        self, own: Own, places: Sequence[Place], before: Sequence[float], base: Sequence[float]
    ) -> dict[str, Any]:
        """Only the first turn goes to the run's end, where it tells bytes and memory; later ones end with training.

        Args:
            own: the row.
            places: of its processes.
            before: its samples/s so far.
            base: those of one thread, by which the first turn's length is chosen.
        """
        batch = self.workload.batch
        # the first quarter of the steps is not counted
        seconds = 4 / 3 * self.extent.seconds
        steps = max(_FIRST_STEPS, round(seconds * (before or base or [0.0])[-1] / batch))
        settings, every = self.workload.settings, max(1, steps // 4)
        if refresh := own.flags.get("refresh"):
            # rows of metrics at whole cycles of refreshes, in epochs short enough to have two of them
            every = _EPOCH * refresh
            steps = every * max(2, -(-steps // every))
            # so few examples, learnt again and again, may diverge at a step size that suits all of them
            settings = replace(settings, train_size=_EPOCH * batch, lr=(settings.lr or 0.0) / 100)
        settings = replace(settings, steps=steps, log_every=every, evaluate_every=10**6, checkpoint_every=10**6)

        def over(so_far: Trained) -> bool:
            return bool(so_far.clock) and so_far.clock[-1][0] >= steps * batch

        flags = own_flags(self.workload, own, settings)
        ended = train(flags, places=places, limit=self.extent.limit, enough=over if before else None)
        at = self.workload.recomputing_cut if own.recomputes else self.workload.cut
        return {"rate": ended.rate, **told(ended.summary, self.facts["saved"][at])}

    def backprop_curves(self) -> list[list[tuple[int, float]]]:
        """Validation loss of one process's backprop over examples, for every seed."""
        return [self._plain(self.workload.settings, seed).curve for seed in self.extent.seeds]

    def large_batch(self, wanted: float) -> tuple[float, list[float]]:
        """The best step size of the large batch on the first seed, and the examples to Q of every seed at it."""
        tried = {}
        many = self.workload.large
        budget = self.workload.budget
        base = replace(self.workload.settings, batch_size=self.workload.batch * many, steps=max(1, 2 * budget // many))
        for lr in self.workload.large_lrs:
            tried[lr] = self._plain(replace(base, lr=lr), self.extent.seeds[0], wanted)
        best = min(tried, key=lambda lr: (examples_to(tried[lr].curve, wanted), _lowest(tried[lr])))
        others = [self._plain(replace(base, lr=best), seed, wanted) for seed in self.extent.seeds[1:]]
        return best, [examples_to(one.curve, wanted) for one in (tried[best], *others)]

    def own_examples(self, own: Own, link: Link, wanted: float) -> list[float]:
        """Examples to Q of every seed, trained in processes of their own up to twice the budget."""
        found = []
        for seed in self.extent.seeds:
            self._say(f"{self.workload.name}, {link.speed.title}: {own.name} to quality, seed {seed}")
            settings = replace(self.workload.settings, steps=2 * self.workload.budget, seed=seed)
            flags = own_flags(self.workload, own, self._evaluated(settings))
            ended = train(flags, places=link.places, limit=8 * self.extent.limit, enough=self._reached(wanted))
            found.append(examples_to(ended.curve, wanted))
        return found

    def _plain(self, settings: Settings, seed: int, wanted: float = -math.inf) -> Trained:
        self._say(f"{self.workload.name}: backprop to quality, batch {settings.batch_size}, seed {seed}")
        settings = self._evaluated(replace(settings, seed=seed))
        assert settings.steps is not None
        whole = settings.steps * settings.batch_size
        reached = self._reached(wanted)

        def enough(so_far: Trained) -> bool:
            return reached(so_far) or bool(so_far.curve and so_far.curve[-1][0] >= 0.995 * whole)

        flags = [*training.arguments(settings), "--blocks", "1"]
        return train(flags, places=LOOPBACK[:1], limit=8 * self.extent.limit, enough=enough)

    def _evaluated(self, settings: Settings) -> Settings:
        every = self.workload.budget * self.workload.batch / settings.batch_size / self.workload.evaluations
        return replace(settings, evaluate_every=max(1, round(every)), log_every=1000, checkpoint_every=10**6)

    def _reached(self, wanted: float) -> Callable[[Trained], bool]:
        return lambda so_far: examples_to(so_far.curve, wanted) < math.inf

    def level(self, curves: Sequence[Sequence[tuple[int, float]]]) -> tuple[float, float]:
        """Q, and the mean of the examples that backprop takes to it."""
        wanted = level(curves, self.workload.budget * self.workload.batch)
        reached = [examples_to(curve, wanted) for curve in curves]
        whole = self.workload.budget * self.workload.batch  # one that is not there at the end counts as there then
        return wanted, statistics.fmean(min(seen, whole) for seen in reached)


def _often(names: Sequence[str]) -> list[str]:
    """The names with the one of one thread after every few of the others.

    >>> _often(["ours", "one thread", "DDP"])
    ['ours', 'DDP', 'one thread']
    """
    others = [name for name in names if name != BASE]
    groups = [others[at : at + _TOGETHER] for at in range(0, len(others), _TOGETHER)] or [[]]
    return [name for group in groups for name in (*group, BASE)]


def own_flags(workload: Workload, own: Own, settings: Settings) -> list[str]:
    """The command line of one of BlockProp's rows."""
    at = workload.recomputing_cut if own.recomputes else workload.cut
    settings = replace(settings, algorithm="blockprop", split_at=(at,), blocks=2)
    return training.arguments(settings, {**own.flags, "executor": "processes", "policy": own.policy})


def told(summary: Mapping[str, Any], saved: Sequence[int]) -> dict[str, Any]:
    """Bytes up and down in a step, and tensor bytes of both blocks, from a run's summary; nothing without one.

    Args:
        summary: of the run.
        saved: bytes that either block keeps for its backward pass, which the run does not count.
    """
    blocks = list(summary.get("processes", {}).values())
    if len(blocks) != 2:
        return {}
    memory = [
        {
            "weights": block["memory"]["weights"],
            "gradients": block["memory"]["weights"],  # they are there at the update, and gone at the end
            "optimizer": block["memory"]["optimizer"],
            "activations": block["memory"]["activations_in_flight"] + own,
        }
        for block, own in zip(blocks, saved, strict=True)
    ]
    return {"sent": [blocks[0]["bytes_per_step"]["up"], blocks[1]["bytes_per_step"]["down"]], "memory": memory}


def _lowest(trained: Trained) -> float:
    return min((loss for _, loss in trained.curve), default=math.inf)
