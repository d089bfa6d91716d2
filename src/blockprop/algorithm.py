"""BlockProp: `report = algo.step(inputs, targets)`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from blockprop.blocks import Blocks
from blockprop.executors import EXECUTORS, Executor, StepReport
from blockprop.executors.executor import Synchronous
from blockprop.executors.mail import Remote
from blockprop.forms import Form, FormName, form_named
from blockprop.hsolvers import HSolver
from blockprop.learner import Learner, Loss, check_batch
from blockprop.losses import OutputLoss
from blockprop.penalties import PenaltyLike, per_link
from blockprop.runtime import processes
from blockprop.stage import Link, Stage
from blockprop.wstep import OptimizerFactory, SchedulerFactory

__all__ = ["BlockProp"]

_NAMES = (*EXECUTORS, "processes")


class BlockProp(Learner):
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
        self.recompute = recompute
        self.executor = _executor(executor)
        super().__init__(
            blocks,
            loss,
            optimizer,
            scheduler=scheduler,
            clip=clip,
            accumulate=accumulate,
            precision=precision,
            devices=devices,
        )
        self.links = _links(self.form, penalty, h_solver, len(blocks) - 1)
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
