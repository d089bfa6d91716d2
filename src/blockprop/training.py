"""The training loop: epochs or steps, evaluation, metrics, checkpoints, and a resume that continues bit for bit."""

import contextlib
import math
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from blockprop.algorithm import BlockProp
from blockprop.backprop import Backprop
from blockprop.checkpoint import Checkpoints
from blockprop.data import Dataset, Split, batch_generator, batches
from blockprop.diagnostics import alignment, curvature
from blockprop.executors import Executor, PipelinedExecutor
from blockprop.executors.executor import check_finite
from blockprop.means import Means
from blockprop.metrics import Metrics

__all__ = ["Score", "Training", "lives_here", "score", "weights_here"]


@dataclass(frozen=True)
class Score:
    """How well a network does on a part of a dataset.

    Attributes:
        loss: mean over predictions.
        accuracy: share of predictions that are right; None where there are no classes.
    """

    loss: float
    accuracy: float | None


def score(algo: BlockProp | Backprop, split: Split, batch_size: int = 128) -> Score:
    """Loss and accuracy on a part of a dataset, in evaluation mode and without augmentation.

    With a process for every block all call it alike, and all get the score.

    Raises:
        ValueError: the part is empty, or the loss is not finite.
    """
    if len(split) == 0:
        raise ValueError("this part of the dataset is empty; expected at least one example to score on")
    total, count, right, known = 0.0, 0.0, 0, True
    remote = algo.remote
    for ids in torch.split(torch.arange(len(split)), batch_size):
        outputs = algo.predict(split.batch_inputs(ids) if remote is None or remote.first else None)
        if outputs is None:
            continue
        targets = split.batch_targets(ids).to(outputs.device)
        mean, predictions = algo.loss(outputs, targets)
        correct = algo.loss.correct(outputs, targets)
        known = known and correct is not None
        right += correct or 0
        total += check_finite(mean) * predictions
        count += predictions
    if remote is None:
        return Score(total / count, right / count if known else None)
    return Score(*remote.share([total / count, right / count if known else None] if remote.last else None))


def weights_here(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights and buffers by name, without those of blocks that live in other processes."""
    return {name: value for name, value in model.state_dict().items() if not value.is_meta}


def lives_here(block: nn.Module) -> bool:
    """Whether a block's weights are in this process; elsewhere they are on the meta device."""
    return not any(parameter.is_meta for parameter in block.parameters())


class Training:
    """A run in progress: where it is, and how to take it on.

    Everything that decides the next step is in [`state`][blockprop.training.Training.state]: weights, buffers,
    optimizers, random state, and the position, from which the order of the data follows.

    Args:
        algo: the algorithm that trains.
        dataset: what it is trained on.
        batch_size: examples a step, default 64; an epoch's last batch may be smaller.
        epochs: passes over the training part; or
        steps: steps to take in all. One of the two.
        seed: of the data's order and augmentation, default 0.
        metrics: where rows are written, or None.
        checkpoints: where checkpoints are written, or None.
        log_every: steps between rows of training metrics, default 50.
        evaluate_every: steps between evaluations on the validation part, default once an epoch.
        evaluate_on: "test" evaluates on the test part instead, for figures; nothing may be chosen by it.
        checkpoint_every: steps between checkpoints, default once an epoch.
        diagnose_every: steps between diagnostics (alignment, curvature), default 0 for never. BlockProp only.
        on_step: called with this after every step, for progress.

    Raises:
        ValueError: an empty training part, or a setting out of range.
    """

    def __init__(
        self,
        algo: BlockProp | Backprop,
        dataset: Dataset,
        *,
        batch_size: int = 64,
        epochs: int | None = None,
        steps: int | None = None,
        seed: int = 0,
        metrics: Metrics | None = None,
        checkpoints: Checkpoints | None = None,
        log_every: int = 50,
        evaluate_every: int | None = None,
        evaluate_on: Literal["validation", "test"] = "validation",
        checkpoint_every: int | None = None,
        diagnose_every: int = 0,
        on_step: Callable[["Training"], None] | None = None,
    ) -> None:
        if not isinstance(algo, BlockProp | Backprop):
            raise ValueError(f"algo is a {type(algo).__name__}; expected a BlockProp or a Backprop")
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"dataset is a {type(dataset).__name__}; expected a Dataset, such as "
                "Dataset.from_tensors((x, y), (x_test, y_test))"
            )
        for name, given, kind in (("metrics", metrics, Metrics), ("checkpoints", checkpoints, Checkpoints)):
            if given is not None and not isinstance(given, kind):
                raise ValueError(f"{name} is a {type(given).__name__}; expected {kind.__name__}(path), or None")
        if epochs is not None and steps is not None:
            raise ValueError("epochs and steps are both given; expected one of the two")
        if epochs is None and steps is None:
            raise ValueError("neither epochs nor steps is given; expected one of the two")
        for name, value in (
            ("epochs", epochs),
            ("steps", steps),
            ("batch size", batch_size),
            ("log-every", log_every),
            ("evaluate-every", evaluate_every),
            ("checkpoint-every", checkpoint_every),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected a whole number of at least 1")
        if diagnose_every < 0:
            raise ValueError(f"diagnose-every is {diagnose_every}; expected a whole number, 0 for never")
        if len(dataset.train) == 0:
            raise ValueError(f"the training part of {dataset.name} is empty; expected at least one example")
        self.algo = algo
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = math.ceil(len(dataset.train) / batch_size)
        self.total_steps = steps if steps is not None else (epochs or 0) * self.steps_per_epoch
        self.metrics = metrics
        self.checkpoints = checkpoints
        self.log_every = log_every
        self.evaluate_every = evaluate_every or self.steps_per_epoch
        self.evaluate_on = evaluate_on
        self.evaluated: Split = getattr(dataset, evaluate_on)
        self.checkpoint_every = checkpoint_every or self.steps_per_epoch
        self.diagnose_every = diagnose_every if isinstance(algo, BlockProp) else 0
        self.on_step = on_step
        self.step = 0
        self.samples = 0
        self.seconds = 0.0
        self.waited = 0.0  # of these, for other processes
        self._sent: dict[str, int] = {}  # bytes, before this process took over
        self.begun = (0.0, 0.0, 0)  # seconds, waited and bytes sent where it did
        self.window = Means()  # since the last row of metrics
        self._logged = 0.0  # seconds at that row
        self.epoch_means = Means()  # since the epoch began
        self.last_epoch: dict[str, Any] = {}
        self.score: Score | None = None  # the latest evaluation

    def run(self) -> None:
        """Train to the end.

        Raises:
            ValueError: the loss stopped being finite, or the data do not fit the network; a checkpoint written
                before stays. Or the checkpoints' folder already holds those of another run.
        """
        if self.step == 0 and self.checkpoints and (found := self.checkpoints.paths()):
            raise ValueError(
                f"{self.checkpoints.folder} already holds checkpoints up to {found[-1].stem}; resume from the "
                "newest, or use another folder"
            )
        self.algo.blocks.model.train()
        try:
            while self.step < self.total_steps:
                epoch, first = divmod(self.step, self.steps_per_epoch)
                order = list(batches(len(self.dataset.train), self.batch_size, seed=self.seed, epoch=epoch))
                for index in range(first, min(len(order), first + self.total_steps - self.step)):
                    self._take(epoch, index, order[index])
        finally:
            if self.algo.remote is None:
                self.algo.close()

    def _take(self, epoch: int, index: int, ids: Tensor) -> None:
        start = time.perf_counter()
        ids, inputs, targets = self._batch(ids, lambda: batch_generator(self.seed, epoch, index))
        self.seconds += time.perf_counter() - start
        if self.diagnose_every and self.step % self.diagnose_every == 0:
            assert inputs is not None and targets is not None
            self._diagnose(inputs, targets, ids)
        if index == 0:
            self.epoch_means = Means()
        start = time.perf_counter()
        report = self.algo.step(inputs, targets, ids)
        last = self.step + 1 == self.total_steps
        if last:
            self.algo.finish()
        self.seconds += time.perf_counter() - start
        self.step += 1
        self.waited += report.waited
        self.samples += report.examples
        self.window.add(report)
        self.epoch_means.add(report)
        if isinstance(pipeline := self._executor, PipelinedExecutor) and (late := pipeline.watched()):
            self._write("diagnostics", {"cosine": [pair[0] for pair in late], "norm_ratio": [pair[1] for pair in late]})
        if last or index == self.steps_per_epoch - 1:
            self.last_epoch = self.epoch_means.values()
        if last or self.step % self.log_every == 0:
            self._log()
        if (last or self.step % self.evaluate_every == 0) and len(self.evaluated):
            self.score = score(self.algo, self.evaluated)
            self._write(self.evaluate_on, {"loss": self.score.loss, "accuracy": self.score.accuracy})
        if self.checkpoints and (last or self.step % self.checkpoint_every == 0):
            self.checkpoints.save(self.step, self.state())
        if self.on_step:
            self.on_step(self)

    def _batch(self, ids: Tensor, generator: Callable[[], torch.Generator]) -> tuple[Tensor, Any, Any]:
        """Numbers, inputs and targets of a batch, as far as this process needs them; of replicas each has its share."""
        train = self.dataset.train
        if (remote := self.algo.remote) is None:
            return ids, *train.batch(ids, generator())
        ids = ids.tensor_split(remote.replicas)[remote.replica]
        # inputs and targets may both depend on the draws: each side makes them anew
        inputs = train.batch_inputs(ids, generator()) if remote.first else None
        return ids, inputs, train.batch_targets(ids, generator()) if remote.last else None

    def _write(self, kind: str, values: dict[str, Any]) -> None:
        if self.metrics:
            epoch = round(self.step / self.steps_per_epoch, 6)
            self.metrics.write(kind, self.step, {"epoch": epoch, "samples": self.samples, **values})

    def _log(self) -> None:
        rate = self.samples / self.seconds if self.seconds else 0.0
        lrs = [wstep.lr for wstep, block in zip(self.algo.wsteps, self.algo.blocks, strict=True) if lives_here(block)]
        timing = {"seconds": self.seconds, "samples_per_second": rate, "lr": lrs}
        if traffic := self.traffic:
            busy = 1 - self.window.waited / max(self.seconds - self._logged, 1e-9)
            timing |= {"busy": busy, **{f"bytes_{way}": count for way, count in traffic.items()}}
        self._logged = self.seconds
        self._write("train", {**self.window.values(), **timing})
        self.window = Means()

    @property
    def traffic(self) -> dict[str, int]:
        """Bytes that this block's process has sent so far, "up", "down", "across"; empty in one process."""
        remote = self.algo.remote
        now = remote.traffic() if remote is not None else {}
        return {way: self._sent.get(way, 0) + count for way, count in now.items()}

    @property
    def _executor(self) -> Executor | None:
        return self.algo.executor if isinstance(self.algo, BlockProp) else None

    def _diagnose(self, inputs: Tensor, targets: Tensor, ids: Tensor) -> None:
        assert isinstance(self.algo, BlockProp)
        if isinstance(pipeline := self._executor, PipelinedExecutor):
            pipeline.watch(len(self.algo.blocks))
            return
        found = alignment(self.algo, inputs, targets, ids)
        self._write(
            "diagnostics",
            {
                "cosine": [one.cosine for one in found],
                "norm_ratio": [one.norm_ratio for one in found],
                "curvature": curvature(self.algo, inputs, targets),
            },
        )

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, as a tree for [`save_state`][blockprop.checkpoint.save_state]."""
        return {
            "model": weights_here(self.algo.blocks.model),
            "algorithm": self.algo.state_dict(),
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "position": {"step": self.step, "samples": self.samples, "seconds": self.seconds, "waited": self.waited},
            "traffic": self.traffic,
            "window": vars(self.window),
            "epoch_means": vars(self.epoch_means),
            "last_epoch": self.last_epoch,
            "steps_per_epoch": self.steps_per_epoch,
            "data": self._fingerprint(),
        }

    def _fingerprint(self) -> int | None:
        """Of the labels of up to 256 training examples from beginning to end; None where this process holds none."""
        count = len(self.dataset.train)
        ids = torch.arange(min(256, count)) * (count - 1) // max(1, min(256, count) - 1)
        with contextlib.suppress(ValueError):  # dropped: another process has them
            labels = self.dataset.train.batch_targets(ids).cpu().contiguous()
            return zlib.crc32(labels.view(torch.uint8).numpy().tobytes())
        return None

    def resume(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Raises:
            ValueError: it is of another model, another cut, or other data, or beyond this run's end.
        """
        missing = {"model", "algorithm", "random", "position"} - state.keys()
        if missing:
            raise ValueError(f"the checkpoint lacks {', '.join(sorted(missing))}; expected one of a training run")
        if state["steps_per_epoch"] != self.steps_per_epoch:
            raise ValueError(
                f"the checkpoint is of a run with {state['steps_per_epoch']} steps an epoch, this one has "
                f"{self.steps_per_epoch}; expected the same data and batch size"
            )
        if state.get("data") not in (None, self._fingerprint()):
            raise ValueError(
                f"the training data of {self.dataset.name} are not those that the run began with: other labels, or in "
                "another order; expected the same, or a new run"
            )
        if state["position"]["step"] > self.total_steps:
            raise ValueError(
                f"the checkpoint is at step {state['position']['step']}, beyond the {self.total_steps} steps of this "
                "run; expected more epochs or steps"
            )
        model = self.algo.blocks.model
        ours = {name: tuple(value.shape) for name, value in weights_here(model).items()}
        theirs = {name: tuple(value.shape) for name, value in state["model"].items()}
        if ours != theirs:
            odd = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
            raise ValueError(
                f"the checkpoint is of another model: {odd[0]} is {theirs.get(odd[0], 'missing')} there and "
                f"{ours.get(odd[0], 'missing')} here; expected the same model settings"
            )
        model.load_state_dict(state["model"], strict=self.algo.remote is None)
        self.algo.load_state_dict(state["algorithm"])
        torch.set_rng_state(state["random"])
        if state["cuda_random"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda_random"])
        self.step, self.samples, self.seconds = (state["position"][key] for key in ("step", "samples", "seconds"))
        self.waited = state["position"].get("waited", 0.0)  # not there in older checkpoints
        self._sent = dict(state.get("traffic", {}))  # neither is this
        self.begun = self.seconds, self.waited, sum(self._sent.values())
        self.window, self.epoch_means = (Means.restored(state[name]) for name in ("window", "epoch_means"))
        self.last_epoch = state["last_epoch"]
        self._logged = self.seconds
        if self.metrics:
            self.metrics.rewind(self.step)
