"""BlockProp and backpropagation, in the same shape: `report = algo.step(inputs, targets)`."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from blockprop.blocks import Blocks
from blockprop.errors import block_failed, first_line
from blockprop.evaluation import autocast
from blockprop.executors import EXECUTORS, Executor, StepReport
from blockprop.executors.executor import Synchronous, check_finite
from blockprop.executors.mail import Remote
from blockprop.forms import Form, FormName, form_named
from blockprop.hsolvers import HSolver
from blockprop.losses import OutputLoss
from blockprop.modes import evaluating
from blockprop.partial import only
from blockprop.penalties import PenaltyLike, per_link
from blockprop.runtime import processes
from blockprop.stage import Link, Stage
from blockprop.wstep import OptimizerFactory, SchedulerFactory, WStep

__all__ = ["Backprop", "BlockProp", "backprop_gradient"]

Loss = Callable[[Tensor, Tensor], Tensor] | OutputLoss
T = TypeVar("T")
_NAMES = (*EXECUTORS, "processes")


def _per_block(name: str, given: T | Sequence[T] | None, blocks: int) -> list[Any]:
    if isinstance(given, Sequence):
        if len(given) != blocks:
            raise ValueError(f"{name} lists {len(given)} values for {blocks} blocks; give one, or one per block")
        return list(given)
    return [given] * blocks


def _checked(blocks: Blocks) -> Blocks:
    if not isinstance(blocks, Blocks):
        raise ValueError(f"blocks is a {type(blocks).__name__}; expected Blocks: blocks = blockprop.split(model, 4)")
    return blocks


def _w_steps(
    blocks: Blocks,
    optimizer: OptimizerFactory | Sequence[OptimizerFactory],
    scheduler: SchedulerFactory | Sequence[SchedulerFactory] | None,
    clip: float | None,
    accumulate: int,
) -> list[WStep]:
    optimizers = _per_block("optimizer", optimizer, len(blocks))
    if not all(callable(make) for make in optimizers):
        raise ValueError(
            "optimizer is not a function; expected one from parameters to an optimizer, such as "
            "lambda params: torch.optim.SGD(params, lr=0.1)"
        )
    schedulers = _per_block("scheduler", scheduler, len(blocks))
    return [
        WStep(block.parameters(), make, schedule, clip, accumulate)
        for block, make, schedule in zip(blocks, optimizers, schedulers, strict=True)
    ]


def _place(blocks: Blocks, devices: Sequence[str | torch.device] | None) -> None:
    """Move block k to device k; fewer devices than blocks hold consecutive blocks each."""
    if devices is None:
        return
    if isinstance(devices, str) or not isinstance(devices, Sequence):
        raise ValueError(f"devices is {devices!r}; expected a list, such as ['cuda:0', 'cuda:1']")
    if not isinstance(blocks, Blocks) or not devices or len(devices) > len(blocks):
        raise ValueError(f"devices lists {len(devices)} devices; expected at least 1 and at most one per block")
    for k, block in enumerate(blocks):
        name = devices[k * len(devices) // len(blocks)]
        try:
            block.to(torch.device(name))
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {str(name)!r} cannot be used: {first_line(error)}") from error


def check_batch(inputs: Tensor | None, targets: Tensor | None) -> None:
    for name, value in (("inputs", inputs), ("targets", targets)):
        if value is None:  # of a block that lives in another process
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}; expected a tensor with one row per example")
        if value.ndim == 0 or len(value) == 0:
            raise ValueError(f"{name} has no rows; expected at least one example")
        # one sum is cheap; only where it is not finite is every number looked at
        if value.is_floating_point() and not math.isfinite(value.sum().item()) and not value.isfinite().all():
            raise ValueError(f"{name} hold NaN or infinity; expected finite numbers: check the data")
    if inputs is not None and targets is not None and len(inputs) != len(targets):
        raise ValueError(f"{len(inputs)} inputs with {len(targets)} targets; expected as many of both")


class _Trained:
    """What the two algorithms have in common: blocks that are trained, each by a W-step of its own."""

    blocks: Blocks
    wsteps: list[WStep]

    @property
    def remote(self) -> Remote | None:
        """The other processes, where every block has one of its own; None where all blocks live here."""
        return None

    @torch.no_grad()
    def predict(self, inputs: Tensor | None) -> Tensor | None:
        """The network's outputs in evaluation mode, by the plain forward pass; shape [N, ...]."""
        assert inputs is not None
        with evaluating([self.blocks.model]):
            return self.blocks(inputs)

    def state_dict(self) -> dict[str, Any]:
        """Optimizers, schedulers and accumulated gradients, block by block. The weights are the model's."""
        return {"blocks": [wstep.state_dict() for wstep in self.wsteps]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            ValueError: the state is of another number of blocks, or of blocks with other parameters.
        """
        if len(state["blocks"]) != len(self.wsteps):
            raise ValueError(
                f"the state is of {len(state['blocks'])} blocks, this network is cut into {len(self.wsteps)}; "
                "expected the state of the same cut"
            )
        for wstep, saved in zip(self.wsteps, state["blocks"], strict=True):
            wstep.load_state_dict(saved)


class BlockProp(_Trained):
    """Train blocks by Algorithm 1: a forward pass, a sweep of h-steps from the top, a W-step of every block.

    Args:
        blocks: what [`split`][blockprop.split.split] returned.
        loss: a torch loss, such as `nn.CrossEntropyLoss()`; see [`OutputLoss`][blockprop.losses.OutputLoss].
        optimizer: from a block's parameters to its optimizer; one function, or one per block.
        form: "exact" (default), "published", "rescaled" or "proximal"; see
            [`forms`][blockprop.forms] and the page "How to choose".
        penalty: λ (default 1), a penalty, or a callable l(h*, output) -> [N]; one, or one per link, bottom first.
        h_solver: solver of the h-step; one, or one per link, bottom first. Default: one gradient step with
            2λγ_h = 1 (exact, proximal), 0.02 (published, the paper's values) or 0.1 (rescaled).
        scheduler: from a block's optimizer to its learning-rate scheduler, stepped with every update; one
            function, or one per block.
        clip: largest gradient norm of a block; default None, no clipping.
        accumulate: update on every n-th step only, with the mean of n gradients; default 1.
        precision: `torch.bfloat16` to evaluate blocks under autocast; default None, as the model is.
        executor: "local" (default), "threads", "processes" for one block in each process that torchrun started (see
            [`processes`][blockprop.runtime.joined.processes]), or an executor.
        devices: where the blocks live, such as ["cuda:0", "cuda:1"]; one per block, or fewer, each for as many
            consecutive blocks. Default: where they are.
        recompute: train block by block: keep only the blocks' boundaries during the forward pass and rebuild
            each block's activations at its turn. Peak activation memory becomes that of the largest block, for
            about one more forward pass.

    Raises:
        ValueError: settings that do not go together; see each.

    >>> import torch
    >>> from torch import nn
    >>> from blockprop.split import split
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> algo = BlockProp(
    ...     split(model, 2), loss=nn.CrossEntropyLoss(), optimizer=lambda params: torch.optim.SGD(params, lr=0.1)
    ... )
    >>> report = algo.step(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
    >>> report.examples, len(report.gluing_loss)
    (5, 1)
    """

    def __init__(
        self,
        blocks: Blocks,
        loss: Loss,
        optimizer: OptimizerFactory | Sequence[OptimizerFactory],
        *,
        form: FormName | str = "exact",
        penalty: PenaltyLike | Sequence[PenaltyLike] = 1.0,
        h_solver: HSolver | Sequence[HSolver] | None = None,
        scheduler: SchedulerFactory | Sequence[SchedulerFactory] | None = None,
        clip: float | None = None,
        accumulate: int = 1,
        precision: torch.dtype | None = None,
        executor: str | Executor = "local",
        devices: Sequence[str | torch.device] | None = None,
        recompute: bool = False,
    ) -> None:
        self.form = form_named(form)
        _place(blocks, devices)
        self.blocks = _checked(blocks)
        self.recompute = recompute
        self.executor = _executor(executor)
        if self.remote is not None:
            _keep_one(blocks, self.remote)  # before an optimizer holds the others
        self.wsteps = _w_steps(blocks, optimizer, scheduler, clip, accumulate)
        if self.remote is not None:
            self.wsteps[self.remote.block - 1].average = self.remote.average
        self.loss = loss if isinstance(loss, OutputLoss) else OutputLoss(loss)
        self.links = _links(self.form, penalty, h_solver, len(blocks) - 1)
        if precision is not None and not (isinstance(precision, torch.dtype) and precision.is_floating_point):
            raise ValueError(f"precision is {precision!r}; expected a floating-point dtype such as torch.bfloat16")
        self.precision = precision
        self.stages = self._stages(precision)

    def _stages(self, precision: torch.dtype | None) -> list[Stage]:
        solvers = [link.solver for link in self.links]
        scales = self.form.scales(solvers, [link.penalty for link in self.links])
        repeatable = self.recompute or not self.form.at_forward or any(solver.evaluates for solver in solvers)
        neighbours: list[Link | OutputLoss] = [*self.links, self.loss]
        return [
            Stage(
                k + 1,
                block,
                self.wsteps[k],
                self.form,
                scale=scales[k],
                below=self.links[k - 1] if k else None,
                above=neighbours[k],
                repeatable=repeatable,
                precision=precision,
            )
            for k, block in enumerate(self.blocks)
        ]

    @property
    def remote(self) -> Remote | None:
        """The other processes, where the executor has one for every block; else None."""
        return getattr(self.executor, "remote", None)

    def predict(self, inputs: Tensor | None) -> Tensor | None:
        """The network's outputs in evaluation mode, by the plain forward pass; shape [N, ...].

        With a process for every block all call it alike: the first block's process gives the inputs, the last
        block's gets the outputs, and the others give and get None.
        """
        if self.remote is not None:
            return self.remote.predict(self.blocks, inputs)
        return super().predict(inputs)

    def step(self, inputs: Tensor | None, targets: Tensor | None, ids: Tensor | None = None) -> StepReport:
        """One iteration of Algorithm 1 on a batch.

        Args:
            inputs: x, shape [N, ...], on any device; None in a process that does not hold the first block.
            targets: y, N rows, as the loss wants them; None in a process that does not hold the last block.
            ids: the examples' numbers in the training set, int64 [N]; needed with a cache, and in a process that holds
                neither the first block nor the last.

        Raises:
            ValueError: an empty batch, shapes that do not fit, labels out of range, a loss that is not finite
                (found before any weight is updated).
        """
        return self._run(inputs, targets, ids, update=True)

    def gradient(self, inputs: Tensor, targets: Tensor, ids: Tensor | None = None) -> StepReport:
        """As `step`, but the gradients are left on the parameters' `.grad` and no weight is updated, nor a cache."""
        return self._run(inputs, targets, ids, update=False)

    def finish(self) -> StepReport | None:
        """Learn from what is still on its way in a pipeline; None where nothing is. Call it after the last step."""
        with torch.enable_grad():
            return self.executor.drain(self.stages)

    def state_dict(self) -> dict[str, Any]:
        """Optimizers, schedulers and accumulated gradients, block by block, and what is on its way between them."""
        return {**super().state_dict(), "executor": self.executor.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            ValueError: the state is of another number of blocks, or of blocks with other parameters.
        """
        super().load_state_dict(state)
        self.executor.load_state_dict(state.get("executor", {}), self.stages)

    def _run(self, inputs: Tensor | None, targets: Tensor | None, ids: Tensor | None, *, update: bool) -> StepReport:
        check_batch(inputs, targets)
        # of a pipeline no step can be taken back: it goes on from a checkpoint, and its sums are its own
        before = [wstep.hold() if isinstance(self.executor, Synchronous) else None for wstep in self.wsteps]
        calls = [wstep.calls for wstep in self.wsteps]
        try:
            with torch.enable_grad():
                return self.executor.step(
                    self.stages, inputs, targets, ids=ids, update=update, recompute=self.recompute
                )
        except BaseException:
            # as if the step had not been tried, except in blocks that had already moved
            for wstep, saved, count in zip(self.wsteps, before, calls, strict=True):
                if saved is None:
                    continue
                moved = wstep.calls != count and wstep.calls % wstep.accumulate == 0
                wstep.calls = wstep.calls if moved else count
                for parameter, gradient in zip(wstep.parameters, saved, strict=True):
                    parameter.grad = None if moved else gradient
            raise

    def close(self) -> None:
        """Give back the executor's threads."""
        self.executor.close()


def backprop_gradient(
    blocks: Blocks,
    wsteps: Sequence[WStep],
    loss: OutputLoss,
    inputs: Tensor,
    targets: Tensor,
    *,
    precision: torch.dtype | None = None,
) -> float:
    """Backpropagate a batch through all blocks, onto the parameters' `.grad`; the mean loss.

    Raises:
        ValueError: an empty batch, labels out of range, a loss that is not finite.
    """
    check_batch(inputs, targets)
    h = inputs
    with torch.enable_grad():
        for k, block in enumerate(blocks, 1):
            parameter = next(block.parameters(), None)
            h = h if parameter is None else h.to(parameter.device)
            try:
                with autocast(h.device, precision):
                    h = block(h)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, IndexError) as error:
                raise block_failed(k, block, h, error) from error
        mean, _ = loss(h.float() if h.dtype == torch.bfloat16 else h, targets.to(h.device))
        value = check_finite(mean)
        parameters = [parameter for wstep in wsteps for parameter in wstep.parameters]
        gradients = iter(torch.autograd.grad(mean, parameters, allow_unused=True))
    for wstep in wsteps:
        wstep.add([next(gradients) for _ in wstep.parameters])
    return value


class Backprop(_Trained):
    """Backpropagation through all blocks at once, as the baseline: same blocks, optimizers, clipping, reports.

    Args:
        blocks: as in [`BlockProp`][blockprop.algorithm.BlockProp].
        loss: as in `BlockProp`.
        optimizer: as in `BlockProp`, one optimizer per block.
        scheduler: as in `BlockProp`.
        clip: largest gradient norm of a block, as in `BlockProp`.
        accumulate: as in `BlockProp`.
        precision: as in `BlockProp`.
        devices: as in `BlockProp`.

    Raises:
        ValueError: as in `BlockProp`.
    """

    def __init__(
        self,
        blocks: Blocks,
        loss: Loss,
        optimizer: OptimizerFactory | Sequence[OptimizerFactory],
        *,
        scheduler: SchedulerFactory | Sequence[SchedulerFactory] | None = None,
        clip: float | None = None,
        accumulate: int = 1,
        precision: torch.dtype | None = None,
        devices: Sequence[str | torch.device] | None = None,
    ) -> None:
        _place(blocks, devices)
        self.blocks = _checked(blocks)
        self.wsteps = _w_steps(blocks, optimizer, scheduler, clip, accumulate)
        self.loss = loss if isinstance(loss, OutputLoss) else OutputLoss(loss)
        self.precision = precision

    def step(self, inputs: Tensor, targets: Tensor, ids: Tensor | None = None) -> StepReport:  # noqa: ARG002
        """One step of backpropagation on a batch; arguments and errors as in `BlockProp.step`."""
        report = self.gradient(inputs, targets)
        for wstep in self.wsteps:
            wstep.update()
        return report

    def gradient(self, inputs: Tensor, targets: Tensor) -> StepReport:
        """As `step`, but the gradients are left on the parameters' `.grad` and no weight is updated."""
        loss = backprop_gradient(self.blocks, self.wsteps, self.loss, inputs, targets, precision=self.precision)
        return StepReport(loss, len(inputs))

    def finish(self) -> None:
        """Nothing is on its way."""

    def close(self) -> None:
        """Nothing to give back."""


def _keep_one(blocks: Blocks, remote: Remote) -> None:
    """The other blocks live in other processes: free their memory here."""
    if len(blocks) != remote.blocks:
        raise ValueError(
            f"the network is cut into {len(blocks)} blocks for {remote.blocks} processes"
            + (f" with {remote.replicas} replicas each" if remote.replicas > 1 else "")
            + "; expected as many of both"
        )
    only(blocks, remote.block)


def _executor(given: str | Executor) -> Executor:
    if given == "processes":
        return processes()
    if not isinstance(given, str):
        if not callable(getattr(given, "step", None)):
            raise ValueError(
                f"executor is a {type(given).__name__}; expected one of {', '.join(_NAMES)}, or an executor"
            )
        return given
    if given not in EXECUTORS:
        raise ValueError(f"unknown executor {given!r}; expected one of {', '.join(_NAMES)}")
    return EXECUTORS[given]()


def _links(
    form: Form,
    penalty: PenaltyLike | Sequence[PenaltyLike],
    h_solver: HSolver | Sequence[HSolver] | None,
    links: int,
) -> list[Link]:
    penalties = per_link(penalty, links)
    if isinstance(h_solver, str):
        raise ValueError(f"h_solver is {h_solver!r}; expected a solver, such as blockprop.GaussNewton()")
    if isinstance(h_solver, Sequence) and len(h_solver) != links:
        raise ValueError(f"h_solver lists {len(h_solver)} solvers for {links} links; give one, or one per link")
    given = list(h_solver) if isinstance(h_solver, Sequence) else [h_solver] * links
    for solver in given:
        if solver is not None and (isinstance(solver, type) or not callable(getattr(solver, "solve", None))):
            name = solver.__name__ if isinstance(solver, type) else type(solver).__name__
            raise ValueError(f"h_solver is a {name}; expected a solver, such as blockprop.GradientDescent(steps=2)")
    solvers = [
        form.solver(penalty) if solver is None else solver.on(penalty)
        for solver, penalty in zip(given, penalties, strict=True)
    ]
    form.check(solvers, penalties)
    return [Link(penalty, solver) for penalty, solver in zip(penalties, solvers, strict=True)]
