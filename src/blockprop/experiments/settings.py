"""The settings of a run: each declared once, for the command line, for Python, and for `config.json`."""

import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import torch
from cyclopts import Group, Parameter

from blockprop.data import NAMES
from blockprop.experiments import conflicts
from blockprop.experiments.optimizers import USUAL_MOMENTUM, OptimizerName
from blockprop.experiments.recorded import check_types, under_todays_names
from blockprop.forms import FormName, form_named
from blockprop.hsolvers import Backtracking, GaussNewton, GradientDescent, HSolver
from blockprop.models.catalogue import sizes
from blockprop.penalties import Huber, Penalty, Squared
from blockprop.schedules import Latency, delay
from blockprop.split import SplitBy

__all__ = ["Settings"]

_DATA = Group("Data", sort_key=1)
_MODEL = Group("Model", sort_key=2)
_ALGORITHM = Group("Algorithm", sort_key=3)
_SCHEDULE = Group("Schedule", sort_key=4)
_PROCESSES = Group("Processes", sort_key=5)
_OPTIMIZER = Group("Optimizer", sort_key=6)
_RUN = Group("Run", sort_key=7)


def _option(group: Group, help_text: str, **more: Any) -> Parameter:
    return Parameter(group=group, help=help_text, negative=(), **more)


# What trains well unattended, by model: optimizer, step size, momentum.
_OPTIMIZERS: dict[str, tuple[OptimizerName, float, float]] = {
    "mlp": ("sgd", 0.1, 0.0),
    "resnet18": ("sgd", 0.05, 0.9),
    "preact-resnet18": ("sgd", 0.05, 0.9),
    "gpt": ("adamw", 3e-3, 0.9),
}
_STEP_SIZES = {"sgd": 0.1, "nesterov": 0.05, "muon": 0.02}
_EPOCHS = {"digits": 30, "mnist": 5, "fashion-mnist": 5, "cifar10": 10}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a run. None means: chosen from the data and the model, and recorded as chosen."""

    data: Annotated[
        str, _option(_DATA, "digits, mnist, fashion-mnist, cifar10, shakespeare, or the path of a .txt file.")
    ] = "digits"
    data_dir: Annotated[
        Path | None, _option(_DATA, "Folder with the data's published files. Else: the user's cache, or a download.")
    ] = None
    validation: Annotated[float, _option(_DATA, "Share of the training data held out to choose by.")] = 0.1
    train_size: Annotated[
        int | None, _option(_DATA, "Train on the first so many examples only, after the validation part is held out.")
    ] = None
    context: Annotated[int, _option(_DATA, "Characters in a window of text.")] = 64
    augment: Annotated[
        bool | None, Parameter(group=_DATA, help="Random crops and flips; on for cifar10 unless switched off.")
    ] = None

    model: Annotated[
        str | None, _option(_MODEL, "mlp, resnet18, preact-resnet18 or gpt. Default: mlp, for text gpt.")
    ] = None
    width: Annotated[
        int | None, _option(_MODEL, "Hidden units, channels or embedding size; each model has its own default.")
    ] = None
    depth: Annotated[int | None, _option(_MODEL, "Weight layers of an mlp (784-300-10 has 2), blocks of a gpt.")] = None
    dropout: Annotated[float, _option(_MODEL, "Share of activations dropped, in [0, 1).")] = 0.0
    norm: Annotated[Literal["batch", "layer"] | None, _option(_MODEL, "Normalisation of an mlp.")] = None

    algorithm: Annotated[Literal["blockprop", "backprop"], _option(_ALGORITHM, "What trains the network.")] = (
        "blockprop"
    )
    blocks: Annotated[int, _option(_ALGORITHM, "K, the number of blocks.")] = 2
    split_by: Annotated[SplitBy, _option(_ALGORITHM, "What is balanced over the blocks.")] = "flops"
    split_at: Annotated[
        tuple[str, ...],
        _option(
            _ALGORITHM, "Names of the modules that begin a block, instead of a balanced cut.", consume_multiple=True
        ),
    ] = ()
    form: Annotated[
        FormName,
        _option(
            _ALGORITHM,
            "exact: backprop's gradient; published: the paper's order; rescaled: published, with gradients on "
            "backprop's scale; proximal: any penalty and h-solver.",
        ),
    ] = "exact"
    penalty: Annotated[
        tuple[float, ...],
        _option(_ALGORITHM, "λ, the weight of the gluing penalty: one, or one per link.", consume_multiple=True),
    ] = (1.0,)
    huber: Annotated[
        float | None,
        _option(_ALGORITHM, "Use the Huber penalty, linear beyond this distance. Needs --form proximal or published."),
    ] = None
    h_steps: Annotated[int, _option(_ALGORITHM, "N_h, steps of the h-step.")] = 1
    h_lr: Annotated[
        float | None, _option(_ALGORITHM, "γ_h, step size of the h-step. Default: by the form (exact: 2λγ_h = 1).")
    ] = None
    h_solver: Annotated[
        Literal["descent", "momentum", "backtracking", "gauss-newton"], _option(_ALGORITHM, "Solver of the h-step.")
    ] = "descent"
    h_momentum: Annotated[float, _option(_ALGORITHM, "Momentum of the solver of that name.")] = 0.5
    executor: Annotated[
        Literal["local", "threads", "processes"],
        _option(
            _ALGORITHM, "One block after the other, W-steps in parallel threads, or every block in its own process."
        ),
    ] = "local"
    devices: Annotated[
        tuple[str, ...],
        _option(
            _ALGORITHM, "Where the blocks live: cpu, cuda:0, ...; one, or up to one per block.", consume_multiple=True
        ),
    ] = ()
    recompute: Annotated[
        bool, _option(_ALGORITHM, "Train block by block in the memory of the largest, for one more forward pass.")
    ] = False

    schedule: Annotated[
        Literal["sync", "cached", "pipelined"] | None,
        _option(
            _SCHEDULE,
            "sync: one batch up and down, Algorithm 1; cached: feedback every --refresh epochs only, between them the "
            "last one of each example; pipelined: all blocks busy on different batches, and feedback is late. Default: "
            "sync; with --executor processes pipelined.",
        ),
    ] = None
    feedback: Annotated[
        Literal["target", "gradient", "stashed"],
        _option(
            _SCHEDULE,
            "What late feedback is: a target for what the block gives now; the gradient as it was, at the present "
            "weights; or that at the weights of its forward pass.",
        ),
    ] = "target"
    curvature: Annotated[
        float | Literal["auto"],
        _option(_SCHEDULE, "κ of the targets, a number, or auto: measured while training."),
    ] = "auto"
    directions: Annotated[
        Literal["all", "along", "both"],
        _option(
            _SCHEDULE,
            "Where κ acts: in all directions alike; along each example's own slope alone, as if cached; or "
            "along and across it, measured apart.",
        ),
    ] = "all"
    per_example: Annotated[
        bool,
        _option(
            _SCHEDULE,
            "A κ for every example, in proportion to its slope's norm; --curvature is then the ratio of the two.",
        ),
    ] = False
    trust: Annotated[
        float | Literal["none"],
        _option(
            _SCHEDULE,
            "Longest correction of an example's late feedback for what has moved since, over what feedback its link "
            "usually has; none: no limit.",
        ),
    ] = 0.3
    cache: Annotated[
        str,
        _option(
            _SCHEDULE,
            "Where feedback is kept: none, memory, or a folder for memory-mapped files. Of --schedule cached: memory.",
        ),
    ] = "none"
    cache_dtype: Annotated[
        Literal["float32", "bfloat16", "int8"],
        _option(_SCHEDULE, "Numbers in the cache; int8 has a scale per example."),
    ] = "float32"
    cache_limit: Annotated[
        float | None,
        _option(
            _SCHEDULE,
            "GiB that the cache may take, in each process if there are several. Default: half of what is free.",
        ),
    ] = None
    refresh: Annotated[int, _option(_SCHEDULE, "E: an example's feedback is computed on every E-th visit.")] = 2
    residual: Annotated[
        float | None,
        _option(
            _SCHEDULE,
            "Refresh a batch as well where the correction of its cached slope has grown to more than this many times "
            "the slope. Default: never.",
        ),
    ] = None
    replay: Annotated[
        bool,
        _option(_SCHEDULE, "Algorithm 2 as published: inputs come from the cache as well. Needs --form published."),
    ] = False
    microbatches: Annotated[
        int | None,
        _option(
            _SCHEDULE,
            "Parts of a batch in the pipeline; more of them make feedback younger. Default: as many as there are ticks "
            "until feedback, 2(K - 1) and more with --latency; of four examples or more, eight with BatchNorm, one of "
            "text.",
        ),
    ] = None
    latency: Annotated[int, _option(_SCHEDULE, "Every message takes up to so many ticks longer, drawn at random.")] = 0
    latency_chances: Annotated[
        tuple[float, ...],
        _option(
            _SCHEDULE,
            "How likely delays of 0, 1, ... up to --latency ticks are. Default: all alike.",
            consume_multiple=True,
        ),
    ] = ()
    lost: Annotated[float, _option(_SCHEDULE, "Share of the feedback messages that are lost.")] = 0.0
    copies: Annotated[
        int | None,
        _option(
            _SCHEDULE,
            "How often feedback is sent, with the messages that follow: it is lost if all of these are. Default: 2 "
            "with --lost.",
        ),
    ] = None
    prediction: Annotated[
        float, _option(_SCHEDULE, "Forward with weights moved on by this share of the updates until the feedback.")
    ] = 0.0
    compensation: Annotated[
        float, _option(_SCHEDULE, "λ of DC-ASGD's delay compensation. Needs --feedback stashed.")
    ] = 0.0
    delay_annealing: Annotated[
        int, _option(_SCHEDULE, "Steps over which step sizes rise from 1/delay of a block to their value (PipeMare).")
    ] = 0

    policy: Annotated[
        Literal["lock-step", "free-running"],
        _option(
            _PROCESSES,
            "lock-step: fixed delays, and the numbers of the same schedule in one process; free-running: no block "
            "waits for a tick, and what bounds the delay is --in-flight.",
        ),
    ] = "lock-step"
    in_flight: Annotated[
        int,
        _option(_PROCESSES, "Microbatches that a free-running block may have on their way for each block above it."),
    ] = 2
    repeats: Annotated[
        int,
        _option(_PROCESSES, "W-steps a free-running block may repeat on its latest batch while it would wait."),
    ] = 0
    newest: Annotated[
        bool,
        _option(
            _PROCESSES,
            "Of several messages that wait, a free-running block learns from the newest alone, and passes the older "
            "batches over; without it from all, the oldest first.",
        ),
    ] = False
    messages: Annotated[
        Literal["float32", "bfloat16", "int8"],
        _option(_PROCESSES, "Numbers between processes, both ways; int8 has a scale per example."),
    ] = "float32"
    replicas: Annotated[
        int,
        _option(_PROCESSES, "Processes for each block, each with its share of every batch; gradients are averaged."),
    ] = 1

    optimizer: Annotated[
        OptimizerName | None,
        _option(_OPTIMIZER, "Optimizer of every block; muon has AdamW for what is no matrix. Default: by the model."),
    ] = None
    lr: Annotated[float | None, _option(_OPTIMIZER, "Step size γ_B of every block. Default: by the model.")] = None
    block_lr: Annotated[
        tuple[float, ...], _option(_OPTIMIZER, "Step size of each block instead, bottom first.", consume_multiple=True)
    ] = ()
    w_damping: Annotated[
        float | None,
        _option(
            _OPTIMIZER, "Proximal W-steps of linear layers, damped by so much of their inputs' mean square; sgd only."
        ),
    ] = None
    momentum: Annotated[
        float | None,
        _option(
            _OPTIMIZER, "Momentum of sgd and nesterov, β1 of adam, adamw and nadam. Default: by model and optimizer."
        ),
    ] = None
    weight_decay: Annotated[float, _option(_OPTIMIZER, "Weight decay.")] = 0.0
    lr_schedule: Annotated[
        Literal["constant", "cosine"], _option(_OPTIMIZER, "How the step size falls over the run.")
    ] = "constant"
    warmup: Annotated[
        int | None,
        _option(
            _OPTIMIZER,
            "Steps over which the step size rises from 0. Default: none; with --schedule pipelined a tenth of the run.",
        ),
    ] = None
    clip: Annotated[float | None, _option(_OPTIMIZER, "Largest gradient norm of a block.")] = None
    accumulate: Annotated[int, _option(_OPTIMIZER, "Update every n batches, with their mean gradient.")] = 1
    precision: Annotated[
        Literal["float32", "bfloat16"], _option(_OPTIMIZER, "bfloat16 evaluates blocks under autocast.")
    ] = "float32"

    batch_size: Annotated[int, _option(_RUN, "Examples a step.")] = 64
    epochs: Annotated[int | None, _option(_RUN, "Passes over the training data. Default: by the data.")] = None
    steps: Annotated[int | None, _option(_RUN, "Steps to train, instead of epochs.")] = None
    seed: Annotated[int, _option(_RUN, "Seed of the weights, the order of the data, augmentation and dropout.")] = 0
    threads: Annotated[
        int | None, _option(_RUN, "Threads of each operation. Default: all cores, shared among the processes.")
    ] = None
    log_every: Annotated[int, _option(_RUN, "Steps between rows of training metrics.")] = 50
    evaluate_every: Annotated[int | None, _option(_RUN, "Steps between validations. Default: once an epoch.")] = None
    evaluate_on: Annotated[
        Literal["validation", "test"],
        _option(_RUN, "test draws the curves of a figure on the test part, from which nothing may be chosen."),
    ] = "validation"
    checkpoint_every: Annotated[int | None, _option(_RUN, "Steps between checkpoints. Default: once an epoch.")] = None
    diagnose_every: Annotated[
        int, _option(_RUN, "Steps between diagnostics: alignment with backprop, curvature. 0: never.")
    ] = 0

    @property
    def who_does_what(self) -> Literal["sync", "cached", "pipelined"]:
        """The schedule, chosen if need be."""
        return self.schedule or ("pipelined" if self.executor == "processes" else "sync")

    @property
    def K(self) -> int:  # noqa: N802 - the paper's symbol
        """The number of blocks."""
        return len(self.split_at) + 1 if self.split_at else self.blocks

    @property
    def augmented(self) -> bool:
        """Whether examples are shown with random crops and flips."""
        return self.data == "cifar10" if self.augment is None else self.augment

    def resolved(self) -> "Settings":
        """With every None that stands for a choice replaced by the choice; twice is as good as once.

        What is without effect goes back to its default. Two settings that train the same way are then equal. What
        stays None has no value: the depth of a residual network, no clipping, a γ_h that differs from link to link.

        Raises:
            ValueError: settings that exclude each other.
        """
        if unused := self.unused():
            defaults = Settings()
            return replace(self, **{key: getattr(defaults, key) for key in unused}).resolved()
        model = self.model or ("gpt" if self.text else "mlp")
        name, lr, momentum = _OPTIMIZERS.get(model, _OPTIMIZERS["mlp"])
        if self.optimizer not in (None, name):
            name = self.optimizer
            lr, momentum = _STEP_SIZES.get(name, 1e-3), USUAL_MOMENTUM.get(name, 0.0)
        conflicts.check(self, name)
        unsaid = self.epochs is None and self.steps is None
        own = sizes(model)
        return replace(
            self,
            blocks=self.K,
            augment=self.augmented,
            schedule=self.who_does_what if self.algorithm == "blockprop" else None,
            model=model,
            width=own.get("width") if self.width is None else self.width,
            depth=own.get("depth") if self.depth is None else self.depth,
            h_lr=self._h_lr() if self.algorithm == "blockprop" else None,
            threads=self._threads() if self.threads is None else self.threads,
            optimizer=name,
            microbatches=self.parts,
            copies=self.messages_late.times if self.lost else None,
            cache="memory" if self.who_does_what == "cached" and self.cache == "none" else self.cache,
            lr=lr if self.lr is None else self.lr,
            momentum=momentum if self.momentum is None else self.momentum,
            warmup=0 if self.warmup is None and self.who_does_what != "pipelined" else self.warmup,
            epochs=_EPOCHS.get(self.data, 5) if unsaid else self.epochs,
        )

    @property
    def passes(self) -> list[float] | None:
        """Passes over a batch that each block makes in a process of its own; None where all make three."""
        if self.executor != "processes" or self.who_does_what != "pipelined" or self.feedback == "stashed":
            return None
        parts, latency = self.parts or 1, self.messages_late.mean
        late = (delay(self.K, k, parts, latency, self.in_flight) for k in range(1, self.K + 1))
        return [3 + min(1.0, updates) for updates in late]

    def _threads(self) -> int:
        """All cores, shared among the processes of this machine, as far as it is known how many there are."""
        processes = self.K * self.replicas if self.executor == "processes" else 1
        here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))  # torchrun says it
        return max(1, torch.get_num_threads() // min(here, processes))

    def unused(self) -> dict[str, str]:
        """Settings that were changed but have no effect beside the others, and for each a line that says why."""
        defaults = Settings()
        return {
            key: f"--{key.replace('_', '-')} {why}: leave it out"
            for key, why in conflicts.without_effect(self).items()
            if getattr(self, key) != getattr(defaults, key)
        }

    @classmethod
    def of_dict(cls, recorded: dict[str, Any]) -> "Settings":
        """What `as_dict` returned; what an older run did not record is at its default.

        Raises:
            ValueError: a value that is not of its setting's type.
        """
        recorded = under_todays_names(recorded)
        check_types(recorded, get_type_hints(cls))
        values = {key: recorded.get(key, default) for key, default in asdict(cls()).items()}
        for key in ("penalty", "split_at", "block_lr", "devices", "latency_chances"):
            values[key] = tuple(values[key])
        values["data_dir"] = None if values["data_dir"] is None else Path(values["data_dir"])
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values."""
        return {key: _plain(value) for key, value in asdict(self).items()}

    def penalties(self) -> list[Penalty] | Penalty:
        """The gluing penalty: one, or one per link."""
        made: list[Penalty] = [Squared(v) if self.huber is None else Huber(v, self.huber) for v in self.penalty]
        return made[0] if len(made) == 1 else made

    def solver(self) -> HSolver | None:
        """The h-solver, or None for the form's default."""
        match self.h_solver:
            case "gauss-newton":
                return GaussNewton(self.h_steps)
            case "backtracking":
                return Backtracking(self.h_steps, self.h_lr)
            case "momentum":
                return GradientDescent(self.h_steps, self.h_lr, self.h_momentum)
            case _ if self.h_steps == 1 and self.h_lr is None:
                return None
            case _:
                return GradientDescent(self.h_steps, self.h_lr)

    @property
    def parts(self) -> int | None:
        """M, microbatches of a batch, chosen if need be; None where there are none."""
        if self.who_does_what != "pipelined" or self.microbatches is not None:
            return self.microbatches
        if self.repeats or self.newest:  # of whole batches
            return 1
        ticks = math.ceil(2 * (self.K - 1) * (1 + self.messages_late.mean))
        least = 1 if self.text else 8 if self.batchnorm else 4  # a window of text is as many predictions as characters
        replicas = self.replicas if self.executor == "processes" else 1
        return max(1, min(ticks, self.batch_size // replicas // least))

    @property
    def messages_late(self) -> Latency:
        """What the schedule counts on."""
        return Latency(self.latency, self.lost, self.seed, self.copies, self.latency_chances)

    @property
    def batchnorm(self) -> bool:
        """Whether the network has BatchNorm, whose statistics are a microbatch's."""
        return self.norm == "batch" or self.model in ("resnet18", "preact-resnet18")

    @property
    def text(self) -> bool:
        """Whether the examples are windows of text."""
        return self.data == "shakespeare" or self.data not in NAMES

    def _h_lr(self) -> float | None:
        """γ_h as the links will have it; None where it differs from one to the next, or the solver has none."""
        solver, penalties = self.solver(), self.penalties()
        found = {
            getattr(form_named(self.form).solver(penalty) if solver is None else solver.on(penalty), "lr", None)
            for penalty in (penalties if isinstance(penalties, list) else [penalties])
        }
        return found.pop() if len(found) == 1 else None


def _plain(value: Any) -> Any:
    match value:
        case Path():
            return str(value)
        case tuple():
            return [_plain(item) for item in value]
        case _:
            return value
