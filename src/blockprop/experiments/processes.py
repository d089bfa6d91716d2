"""A run with a process for every block: what one process does, however it was started.

Three ways lead here. The launcher starts all processes on this machine and shows them as one; `torchrun` starts them,
on one machine or several; or somebody starts each with `blockprop worker`. The run's folder has a folder for each
block, with its metrics, checkpoints and weights; what the last block's process knows of the whole, loss and scores, is
at its root.
"""

import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from blockprop import BlockProp
from blockprop.checkpoint import Checkpoints, load_state, write_atomically
from blockprop.data import Dataset
from blockprop.errors import first_line
from blockprop.executors import PipelinedExecutor
from blockprop.experiments.board import Board, Reporter
from blockprop.experiments.execution import executor_of
from blockprop.experiments.folder import claimed, settings_of, write_json
from blockprop.experiments.ingredients import (
    config_of,
    cut_of,
    dataset_of,
    network_of,
    summary_of,
    trainer_of,
    training_of,
    weights_of,
)
from blockprop.experiments.settings import Settings
from blockprop.metrics import Metrics
from blockprop.partial import build_block, tensor_bytes
from blockprop.runtime import FreeRunningExecutor, LostError, Neighbours, Place, Rendezvous
from blockprop.runtime.failure import PATIENCE, fail, guard, why_lost
from blockprop.runtime.rendezvous import LOOPBACK, serves_the_store
from blockprop.training import Training

__all__ = ["assembled", "join", "of_torchrun", "places"]

_OWN = {"data_dir", "devices", "threads", "cache", "log_every"}
"""Settings that a process may have for itself."""


def places(settings: Settings) -> list[Place]:
    """All places of a run, by rank."""
    count = settings.blocks * settings.replicas
    return [Place.of_rank(rank, settings.blocks, settings.replicas) for rank in range(count)]


# -- one process


def join(
    settings: Settings,
    out: Path,
    place: Place,
    connect: Callable[[], Rendezvous],
    *,
    listen: str = LOOPBACK,
    resume: bool = False,
    show: bool = False,
    serving: bool = False,
    loud: bool = False,
) -> dict[str, Any]:
    """Train one block, in this process, with the others that meet at the same store.

    Args:
        settings: the run's, the same in all processes.
        out: the run's folder; on several machines each has one of its own.
        place: which block and replica this process is.
        connect: to the store.
        listen: this process's address for connections; default this machine alone.
        resume: continue from the newest checkpoint that all processes have.
        show: show the table of all blocks here.
        serving: whether this process serves the store; it then leaves last.
        loud: say on standard error why the process ends, where it ends while it waits for another one.

    Returns:
        The summary of the run.

    Raises:
        ValueError: a user's mistake.
        LostError: the run failed in another process, or was stopped.
    """
    rendezvous = connect()
    block = _Block(settings, out, place, listen)

    def end(why: str) -> None:
        if loud:
            print(f"blockprop: {why}", file=sys.stderr, flush=True)
        os._exit(3)

    watching = guard(rendezvous, place, block.finished, block.lose, patience=PATIENCE, end=end)
    try:
        with _shown(rendezvous.again(), settings) if show else contextlib.nullcontext():
            summary = block.train(rendezvous, resume=resume)
        rendezvous.write(f"left/{place.name}", True)
        for one in places(settings) if serving else ():
            rendezvous.wait(f"left/{one.name}", 60)
        return summary
    except LostError as error:
        raise LostError(why_lost(rendezvous, place, error)) from error
    except (ValueError, OSError) as error:
        fail(rendezvous, place, first_line(error), serving=serving)
        raise
    except KeyboardInterrupt:
        fail(rendezvous, place, "it was stopped", serving=serving)
        raise
    except BaseException as error:
        path = block.folder / "error.txt"
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(traceback.format_exc(), encoding="utf-8")
        why = f"{type(error).__name__}: {first_line(error)} (all of it is in {path})"
        fail(rendezvous, place, why, serving=serving)
        raise
    finally:
        watching.join(1.0)


@contextlib.contextmanager
def _shown(rendezvous: Rendezvous, settings: Settings) -> Any:
    done = threading.Event()

    def show() -> None:
        with Board(rendezvous, places(settings)[:: settings.replicas], settings, quiet=False) as board:
            while not done.wait(0.5):
                with contextlib.suppress(Exception):  # the run's end says more than its board
                    board.refresh()

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(1.0)


class _Block:
    """The training of one block in this process."""

    def __init__(self, settings: Settings, out: Path, place: Place, listen: str) -> None:
        self.settings, self.out, self.place, self.listen = settings, out, place, listen
        self.folder = out / place.name
        self.finished = threading.Event()
        self._neighbours: Neighbours | None = None

    def lose(self, why: str) -> None:
        """End what waits for a neighbour."""
        if self._neighbours is not None:
            self._neighbours.post.lose(why)

    def train(self, rendezvous: Rendezvous, *, resume: bool) -> dict[str, Any]:
        """See `join`."""
        try:
            torch.set_num_threads(self.settings.threads or 1)
            self._compare(rendezvous)
            with contextlib.ExitStack() as stack:
                if resume:  # before a checkpoint is looked at that another process might be writing
                    stack.enter_context(claimed(self.folder))
                state = self._state(rendezvous) if resume else None
                dataset = self._data()
                algo, neighbours = self._algorithm(dataset, rendezvous)
                if not resume:  # not before all mistakes are said
                    stack.enter_context(claimed(self.folder))
                training = self._training(algo, dataset, rendezvous, state)
                if resume:  # of a run's earlier end; the blocks' weights are of one end, or `assembled` finds none
                    (self.folder / "model.safetensors").unlink(missing_ok=True)
                summary = self._train(training, rendezvous)
            neighbours.close()
            return summary
        finally:
            self.finished.set()

    def _train(self, training: Training, rendezvous: Rendezvous) -> dict[str, Any]:
        try:
            training.run()
            return self._summary(training, rendezvous)
        finally:
            assert training.metrics is not None
            training.metrics.close()

    def _compare(self, rendezvous: Rendezvous) -> None:
        """Refuse to train with processes that were started with other settings."""
        ours = {key: value for key, value in self.settings.as_dict().items() if key not in _OWN}
        if self.place.block == 1 and self.place.replica == 0:
            rendezvous.write("settings", ours)
        theirs = rendezvous.wait("settings")
        for key in ours.keys() | theirs.keys():
            if ours.get(key) != theirs.get(key):
                raise ValueError(
                    f"--{key.replace('_', '-')} is {ours.get(key)} for {self.place.name} and {theirs.get(key)} for "
                    "block-1; expected the same settings in all processes"
                )

    def _state(self, rendezvous: Rendezvous) -> dict[str, Any]:
        """The newest checkpoint that all processes have."""
        checkpoints = Checkpoints(self.folder / "checkpoints")
        steps = {int(path.stem.removeprefix("step-")): path for path in checkpoints.paths()}
        rendezvous.write(f"steps/{self.place.name}", list(steps))
        common = set(steps)
        for place in places(self.settings):
            common &= set(rendezvous.wait(f"steps/{place.name}"))
        if not common:
            raise ValueError(f"{self.out} holds no checkpoint that all blocks have; start the run anew")
        for step, path in steps.items():
            if step > max(common):
                path.unlink()
        return load_state(steps[max(common)])

    def _data(self) -> Dataset:
        """What this block reads of the data: inputs, labels, or how many there are."""
        settings, place = self.settings, self.place
        dataset = dataset_of(settings)
        rest = len(dataset.train) % settings.batch_size
        if 0 < rest < settings.replicas:
            raise ValueError(
                f"an epoch's last batch has {rest} examples, fewer than --replicas {settings.replicas}; expected "
                "another --batch-size or --train-size"
            )
        self._sample = dataset.sample.to("meta")
        if place.block > 1:
            dataset = dataset.only_targets()
        return dataset if place.top else dataset.only_inputs()

    def _algorithm(self, dataset: Dataset, rendezvous: Rendezvous) -> tuple[BlockProp, Neighbours]:
        settings, place = self.settings, self.place
        torch.manual_seed(settings.seed)
        blocks = build_block(
            lambda: network_of(settings, dataset), lambda model: cut_of(settings, model, self._sample), place.block
        )
        if settings.devices:
            name = settings.devices[(place.block - 1) * len(settings.devices) // place.blocks]
            try:
                blocks[place.block - 1].to(torch.device(name))
            except (RuntimeError, AssertionError) as error:
                raise ValueError(f"device {name!r} cannot be used: {first_line(error)}") from error
        # dropout masks of their own for every block and replica
        torch.manual_seed(settings.seed * 1_000_003 + place.block * 1009 + place.replica)
        self._neighbours = neighbours = Neighbours(place, rendezvous, listen=self.listen, precision=settings.messages)
        executor = executor_of(settings, len(dataset.train), neighbours)
        algo = trainer_of(settings, blocks, dataset, executor=executor)
        assert isinstance(algo, BlockProp)
        return algo, neighbours

    def _training(
        self, algo: BlockProp, dataset: Dataset, rendezvous: Rendezvous, state: dict[str, Any] | None
    ) -> Training:
        settings, place = self.settings, self.place
        reporter = Reporter(rendezvous.again(), place)

        training = training_of(settings, algo, dataset, reporter.update)
        root = self.out if place.top and place.replica == 0 else self.folder
        training.metrics = Metrics(root / "metrics.jsonl", self.out / "tensorboard" / place.name)
        # neighbours meet twice at each, so that two blocks further one may be another behind, and so may a replica:
        # all have one in common
        training.checkpoints = Checkpoints(self.folder / "checkpoints", keep=max(2, 1 + place.blocks // 2))
        if state is not None:
            training.resume(state)
        write_json(self.out / "config.json", config_of(settings, training))
        return training

    def _summary(self, training: Training, rendezvous: Rendezvous) -> dict[str, Any]:
        """Evaluate, write this block's weights, and put together what all processes know."""
        settings, place = self.settings, self.place
        summary = summary_of(settings, training)
        if place.replica == 0:
            write_atomically(self.folder / "model.safetensors", weights_of(training))
        optimizer = training.algo.wsteps[place.block - 1].optimizer
        memory = tensor_bytes(training.algo.blocks[place.block - 1], optimizer)
        assert isinstance(training.algo, BlockProp)
        assert isinstance(training.algo.executor, PipelinedExecutor | FreeRunningExecutor)
        own = {
            "bytes_per_step": {way: count / max(1, training.step) for way, count in training.traffic.items()},
            "memory": {**memory, **asdict(training.algo.executor.held())},
            "busy": 1 - training.waited / training.seconds if training.seconds else 0.0,
        }
        if settings.newest:
            assert isinstance(training.algo.executor, FreeRunningExecutor)
            own["passed_over"] = training.algo.executor.passed
        rendezvous.write(f"done/{place.name}", own)
        summary["processes"] = {one.name: rendezvous.wait(f"done/{one.name}", 600) for one in places(settings)}
        if place.top and place.replica == 0:
            write_json(self.out / "summary.json", summary)
            rendezvous.write("summary", summary)
        return summary


def assembled(run: Path, path: Path) -> int:
    """Write the weights of all blocks of a run into one file, by the names of the whole network.

    Args:
        run: the run's folder, with the folders of all blocks.
        path: the safetensors file.

    Returns:
        How many tensors it holds.

    Raises:
        ValueError: it is no run of several processes, or a block's weights are missing.
    """
    settings = settings_of(run)
    if settings.executor != "processes":
        raise ValueError(f"{run} is a run in one process; its weights are in {run / 'model.safetensors'}")
    weights: dict[str, Tensor] = {}
    for k in range(1, settings.blocks + 1):
        part = run / f"block-{k}" / "model.safetensors"
        if not part.exists():
            raise ValueError(
                f"there is no {part}; expected a finished run, and the folders of all its blocks: copy those of other "
                f"machines into {run}"
            )
        weights |= load_file(part)
    write_atomically(path, save(weights))
    return len(weights)


# -- started by torchrun


def of_torchrun(settings: Settings, out: Path, *, resume: bool, quiet: bool, listen: str = LOOPBACK) -> dict[str, Any]:
    """Join a run that torchrun started, at the place of this process's rank.

    Raises:
        ValueError: the number of processes is not that of the blocks times the replicas; else as `join`.
        LostError: as `join`.
    """
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    count = settings.blocks * settings.replicas
    if world != count:
        if rank:
            raise LostError("the first process says why")
        raise ValueError(
            f"torchrun started {world} processes for {settings.blocks} blocks"
            + (f" x {settings.replicas} replicas" if settings.replicas > 1 else "")
            + f"; expected --nproc-per-node and --nnodes to make {count}, or --blocks {world}"
        )
    place = Place.of_rank(rank, settings.blocks, settings.replicas)
    show, serving = rank == 0 and not quiet, serves_the_store()
    return join(
        settings,
        out,
        place,
        lambda: Rendezvous.of_torchrun(listen),
        listen=listen,
        resume=resume,
        show=show,
        serving=serving,
    )
