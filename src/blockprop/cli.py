"""The command line. Every command is a thin layer over the library."""

import itertools
import json as json_text
import os
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from cyclopts import App, CycloptsError, Parameter, Token, convert
from rich.console import Console

from blockprop import __version__, schedules
from blockprop.experiments.comparison import Planned
from blockprop.experiments.comparison import compare as run_comparison
from blockprop.experiments.cost import cost as cost_of
from blockprop.experiments.cost import record
from blockprop.experiments.cost import table as cost_table
from blockprop.experiments.folder import check_folder, read_json
from blockprop.experiments.plan import contention_of, costs_of
from blockprop.experiments.plan import record as plan_record
from blockprop.experiments.plan import table as plan_table
from blockprop.experiments.processes import assembled, join, of_torchrun
from blockprop.experiments.report import Run, find_runs, groups, markdown, plot, table
from blockprop.experiments.run import checked, resumed, run
from blockprop.experiments.run import resume as resume_run
from blockprop.experiments.settings import Settings
from blockprop.forms import FormName
from blockprop.planning.cluster import Cluster, Link
from blockprop.planning.plan import Setting, plan
from blockprop.runtime import LostError, Place, Rendezvous
from blockprop.runtime.edge import EDGE_THREADS
from blockprop.runtime.rendezvous import LOOPBACK, parse_address
from blockprop.studies.beyond import beyond
from blockprop.studies.drawing import require_matplotlib
from blockprop.studies.figure2 import figure2
from blockprop.studies.figure3 import figure3
from blockprop.studies.gap import gap
from blockprop.studies.options import StudyOptions
from blockprop.studies.winners import draw, winners

__all__ = ["app", "main"]

_NUMBER = re.compile(r"[+-]?\d*\.?\d+")


def _converted(hint: Any, tokens: Sequence[Token]) -> Any:
    """What was typed, as the type asked for; a whole number only if it is one, where the parser itself would round."""
    if int in (hint, *get_args(hint)) and float not in get_args(hint):
        for value in (token.value for token in tokens):
            if _NUMBER.fullmatch(value) and not float(value).is_integer():
                raise ValueError(f"{value} is not a whole number")
    return convert(hint, tokens)


app = App(
    name="blockprop",
    help="Train neural networks as decoupled blocks, glued by a penalty.",
    version=__version__,
    default_parameter=Parameter(converter=_converted),
    help_on_error=False,
    suppress_keyboard_interrupt=False,  # `main` says that the run can be continued
)
_DEFAULTS = Settings()
_STUDY_OPTIONS = StudyOptions()
_SHORT = {
    "backprop": {"algorithm": "backprop"},
    "blockprop": {"algorithm": "blockprop"},
    **{name: {"algorithm": "blockprop", "form": name} for name in FormName.__args__},  # type: ignore[attr-defined]
}


@app.command
def train(
    settings: Settings = _DEFAULTS,
    *,
    out: Annotated[Path | None, Parameter(help="The run's folder. Default: a new one under runs/.")] = None,
    resume: Annotated[
        bool,
        Parameter(
            help="Continue the run in --out from its newest checkpoint; settings left at their defaults are the run's.",
            negative=(),
        ),
    ] = False,
    listen: Annotated[
        str | None,
        Parameter(help="Under torchrun on several machines: this one's address. Default: none from outside."),
    ] = None,
    quiet: Annotated[bool, Parameter(help="Show no progress.", negative=())] = False,
) -> None:
    """Train one network, and leave its configuration, metrics, checkpoints and summary in a folder."""
    if resume and out is None:
        raise ValueError("--resume needs --out, the folder of the run to continue")
    if out is None:
        out = Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{Path(settings.data).stem}-{settings.algorithm}"
    if settings.executor == "processes" and "TORCHELASTIC_RUN_ID" in os.environ:
        joined = _joined(settings, out, resume=resume)
        _report(of_torchrun(joined, out, resume=resume, quiet=quiet, listen=listen or LOOPBACK), out)
        return
    if listen is not None:
        raise ValueError("--listen is for processes that torchrun starts: leave it out, or see blockprop worker")
    before = read_json(out / "summary.json") if resume and (out / "summary.json").exists() else {}
    summary = (resume_run if resume else run)(settings, out, quiet=quiet)
    if summary["steps"] == before.get("steps"):
        print("already finished; give more --epochs or --steps to continue: ", end="")
    _report(summary, out)


def _joined(settings: Settings, out: Path, *, resume: bool) -> Settings:
    """Settings of a run that several processes come to on their own, each of which looks at the folder by itself."""
    if resume:
        return resumed(settings, out)
    if (out / "summary.json").exists() or any(out.glob("block-*/checkpoints/*")):
        raise ValueError(f"{out} already holds a run; name another --out, or continue it with --resume")
    return checked(settings)


def _report(summary: dict[str, Any], out: Path) -> None:
    if int(os.environ.get("RANK", "0")):
        return  # of several processes that print to one terminal, one is enough
    accuracy = summary["test_accuracy"]
    result = f"test loss {summary['test_loss']:.4f}" + ("" if accuracy is None else f", test accuracy {accuracy:.2%}")
    print(f"{result}; {summary['samples_per_second']:,.0f} samples/s; everything is in {out}")


@app.command
def worker(
    settings: Settings = _DEFAULTS,
    *,
    block: Annotated[int, Parameter(help="k, the block of this process, from 1.")],
    store: Annotated[str, Parameter(help="HOST:PORT where the processes meet; the first block's process serves it.")],
    out: Annotated[Path, Parameter(help="The run's folder; on several machines each has one of its own.")],
    replica: Annotated[int, Parameter(help="Which replica of the block, from 0.")] = 0,
    listen: Annotated[
        str, Parameter(help="This machine's address for connections from others. Default: none from outside.")
    ] = LOOPBACK,
    serve: Annotated[
        bool | None, Parameter(help="Whether the store is served here. Default: by the first block's process.")
    ] = None,
    wait: Annotated[float, Parameter(help="Seconds to wait for the store to answer.")] = 60.0,
    resume: Annotated[
        bool, Parameter(help="Continue from the newest checkpoint that all processes have.", negative=())
    ] = False,
    quiet: Annotated[bool, Parameter(help="Show no progress.", negative=())] = False,
) -> None:
    """Train one block here, with processes that were started elsewhere with the same settings."""
    address = parse_address(store)
    settings = _joined(replace(settings, executor="processes"), out, resume=resume)
    for name, value, low, high in (
        ("block", block, 1, settings.blocks),
        ("replica", replica, 0, settings.replicas - 1),
    ):
        if not low <= value <= high:
            raise ValueError(f"--{name} is {value}; expected a number from {low} to {high}")
    serving = (block, replica) == (1, 0) if serve is None else serve
    place = Place(block, settings.blocks, replica, settings.replicas)
    summary = join(
        settings,
        out,
        place,
        lambda: Rendezvous(address, host=serving, listen=listen, timeout=wait),
        listen=listen,
        resume=resume,
        show=serving and not quiet,
        serving=serving,
        loud=True,
    )
    _report(summary, out)


@app.command
def assemble(
    run: Annotated[Path, Parameter(help="Folder of a run with a process for every block.")],
    *,
    out: Annotated[Path | None, Parameter(help="The file. Default: model.safetensors in the folder.")] = None,
) -> None:
    """Put the weights of all blocks together, as one plain state_dict in a safetensors file."""
    path = out or run / "model.safetensors"
    if path.exists():
        raise ValueError(f"{path} is there already; move it away, or name another --out")
    names = assembled(run, path)
    print(f"{names} tensors in {path}")


@app.command
def compare(
    settings: Settings = _DEFAULTS,
    *,
    variant: Annotated[
        tuple[str, ...],
        Parameter(
            help="One thing to compare, repeatable: backprop, a form's name, or settings such as "
            "'published h-lr=0.1 epochs=3'. Default: backprop, and BlockProp with the settings given.",
            negative=(),
        ),
    ] = (),
    seeds: Annotated[tuple[int, ...], Parameter(help="Seeds, each for all.", consume_multiple=True, negative=())] = (
        0,
        1,
        2,
    ),
    out: Annotated[Path, Parameter(help="Folder of all runs; a comparison that was stopped continues there.")],
    jobs: Annotated[int, Parameter(help="Runs at a time, each in a process of its own.")] = 1,
    quiet: Annotated[bool, Parameter(help="Show no progress.", negative=())] = False,
) -> None:
    """Run several algorithms or settings over several seeds, on the same data in the same order."""
    check_folder(out)
    if settings.seed != _DEFAULTS.seed:
        raise ValueError(f"--seed {settings.seed} is of one run; expected --seeds, for all variants alike")
    variants = {text: _variant(settings, text) for text in variant or ("backprop", "blockprop")}
    unused = [one.unused() for one in variants.values()]
    for key, why in (unused[0] | settings.unused()).items():
        if all(key in other for other in unused):
            raise ValueError(why)
    console = Console(stderr=True, highlight=False)

    def done(planned: Planned, summary: dict[str, Any], _: float) -> None:
        result = "diverged" if summary.get("diverged") else f"test loss {summary['test_loss']:.4f}"
        if not quiet:
            console.print(f"{planned.name}, seed {planned.settings.seed}: {result}", soft_wrap=True)

    run_comparison(variants, seeds, out, jobs=jobs, quiet=quiet, on_run=done)
    _show([out], out)


@app.command
def report(
    *folders: Annotated[Path, Parameter(help="Folders of runs or comparisons.", negative=())],
    out: Annotated[
        Path | None, Parameter(help="Where table and plot go. Default: the folder, if there is one.")
    ] = None,
) -> None:
    """Redraw the table and the plot of finished runs; one of each for every data set."""
    if not folders:
        raise ValueError("report needs at least one folder of runs: blockprop report DIR")
    if out is None and len(folders) > 1:
        raise ValueError(f"report of {len(folders)} folders needs --out, a folder for the table and the plot")
    _show(folders, out or folders[0])


@app.command
def cost(
    model: Annotated[str, Parameter(help="mlp, resnet18, preact-resnet18 or gpt.")],
    *,
    width: Annotated[int | None, Parameter(help="Hidden units, channels or embedding size.")] = None,
    depth: Annotated[int | None, Parameter(help="Weight layers of an mlp, blocks of a gpt.")] = None,
    dropout: Annotated[float, Parameter(help="Share of activations dropped, in [0, 1).")] = 0.0,
    norm: Annotated[Literal["batch", "layer"] | None, Parameter(help="Normalisation of an mlp.")] = None,
    blocks: Annotated[int, Parameter(help="K, the number of blocks.")] = 2,
    h_steps: Annotated[int, Parameter(help="N_h, steps of the h-step.")] = 1,
    batch_size: Annotated[int, Parameter(help="Examples a step.")] = 64,
    context: Annotated[int, Parameter(help="Characters in an example of a gpt.")] = 64,
    repeats: Annotated[int, Parameter(help="Rounds of timing.")] = 7,
    json: Annotated[bool, Parameter(help="Print JSON instead of the table.", negative=())] = False,
) -> None:
    """Count and time what a training step costs in every form, beside backprop and Appendix A's bounds."""
    sizes = {"width": width, "depth": depth, "dropout": dropout, "norm": norm, "context": context}
    counts = {"blocks": blocks, "h_steps": h_steps, "batch_size": batch_size, "repeats": repeats}
    made, flops, seconds = cost_of(model, **sizes, **counts)  # type: ignore[arg-type]
    if json:
        print(json_text.dumps({"model": model, "batch_size": batch_size, **record(made, flops, seconds)}, indent=1))
        return
    title = f"{model}, K = {blocks}, batch of {batch_size}, N_h = {h_steps}: {made.cut}"
    Console(width=None if sys.stdout.isatty() else 120).print(cost_table(flops, seconds, title))


@app.command(name="plan")
def plan_command(
    model: Annotated[str, Parameter(help="mlp, resnet18, preact-resnet18 or gpt.")],
    *,
    width: Annotated[int | None, Parameter(help="Hidden units, channels or embedding size.")] = None,
    depth: Annotated[int | None, Parameter(help="Weight layers of an mlp, blocks of a gpt.")] = None,
    context: Annotated[int, Parameter(help="Characters in an example of a gpt.")] = 64,
    batch_size: Annotated[int, Parameter(help="Examples of a batch, over all devices together.")] = 128,
    blocks: Annotated[int, Parameter(help="K, the number of blocks and devices.")] = 2,
    speeds: Annotated[
        tuple[float, ...],
        Parameter(
            help="Of the devices, relative to this one: K numbers, or one for all.", consume_multiple=True, negative=()
        ),
    ] = (1.0,),
    bandwidth: Annotated[float, Parameter(help="Of a link, each way, in Mbit/s.")] = 1000.0,
    latency: Annotated[float, Parameter(help="Of a link, one way, in ms.")] = 1.0,
    overhead: Annotated[float, Parameter(help="Of the software, a message, in ms; gloo's by default.")] = 1.1,
    contention: Annotated[
        float | Literal["measured"],
        Parameter(help="How many times longer a device takes beside another one; measured: for two on this machine."),
    ] = 1.0,
    microbatches: Annotated[int, Parameter(help="Of GPipe, 1F1B and zero bubble.")] = 4,
    parts: Annotated[int, Parameter(help="Microbatches of BlockProp.")] = 1,
    refresh: Annotated[int, Parameter(help="E, BlockProp, cached: feedback in every E-th epoch.")] = 2,
    in_flight: Annotated[int, Parameter(help="Free-running: batches on their way for each block above.")] = 2,
    repeats: Annotated[int, Parameter(help="Rounds of timing.")] = 5,
    json: Annotated[bool, Parameter(help="Print JSON instead of the table.", negative=())] = False,
    plot: Annotated[
        Path | None,
        Parameter(help="Draw which method wins over bandwidth and K = 2, 4, ..., --blocks: a PNG and an SVG."),
    ] = None,
) -> None:
    """Predict how fast every method would train a model on a cluster, from costs measured here and a simulation."""
    if blocks < 1:
        raise ValueError(f"--blocks is {blocks}; expected a whole number of at least 1")
    if len(speeds) not in (1, blocks):
        raise ValueError(f"--speeds has {len(speeds)} numbers; expected one for all devices, or {blocks}")
    if plot is not None:
        require_matplotlib()
        _check_picture(plot)
    all_speeds = speeds * blocks if len(speeds) == 1 else speeds
    cluster = Cluster(all_speeds, Link(bandwidth, latency, overhead), 1.0 if contention == "measured" else contention)
    setting = Setting(batch_size, microbatches, parts, refresh, in_flight)
    sizes: dict[str, Any] = {"width": width, "depth": depth, "context": context, "batch_size": batch_size}
    layers = costs_of(model, **sizes, repeats=repeats)
    if contention == "measured":
        cluster = replace(cluster, contention=contention_of(model, **sizes))
    found = plan(layers, cluster, setting)
    if json:
        print(json_text.dumps({"model": model, **plan_record(found, layers, cluster, setting)}, indent=1))
    else:
        title = (
            f"{model}, {len(layers)} layers, K = {blocks}, batch of {batch_size}, {bandwidth:g} Mbit/s, {latency:g} ms"
        )
        Console(width=None if sys.stdout.isatty() else 120).print(plan_table(found, layers, title))
    if plot is not None:
        title = f"{model}, {len(layers)} layers, batch of {batch_size}, latency {latency:g} ms"
        draw(winners(layers, cluster, setting), plot, title)


def _check_picture(path: Path) -> None:
    if path.suffix not in ("", ".png", ".svg"):
        raise ValueError(f"--plot is {path}; expected a name that ends in .png, .svg or nothing: both are made")
    for made in (path.with_suffix(".png"), path.with_suffix(".svg")):
        if made.exists():
            raise ValueError(f"{made} is there already; move it away, or name another --plot")


@app.command
def figure(
    number: Annotated[Literal[2, 3], Parameter(help="2: MNIST, over N_h and λ. 3: ResNet18 on CIFAR-10.")],
    options: StudyOptions = _STUDY_OPTIONS,
    *,
    width: Annotated[int | None, Parameter(help="Figure 3: width of the network. Default: 64.")] = None,
    epochs: Annotated[int | None, Parameter(help="Epochs. Default: 3 for figure 2, 10 for figure 3.")] = None,
    train_size: Annotated[int | None, Parameter(help="Figure 3: training images. Default: all.")] = None,
) -> None:
    """Run a figure of the paper, with the baselines and rows that explain it."""
    sizes = {"width": width, "epochs": epochs, "train_size": train_size}
    given: dict[str, Any] = {key: value for key, value in sizes.items() if value is not None}
    if number == 2 and (wrong := given.keys() - {"epochs"}):
        raise ValueError(f"--{min(wrong).replace('_', '-')} is of figure 3; leave it out")
    for key, value in given.items():
        if value < 1:
            raise ValueError(f"--{key.replace('_', '-')} is {value}; expected a whole number of at least 1")
    make = figure2 if number == 2 else figure3
    study = make(data_dir=options.data_dir, seeds=options.seeds, quick=options.quick, **given)
    words = "".join(f" --{key.replace('_', '-')} {value}" for key, value in given.items())
    options.perform(study, f"blockprop figure {number}{words}")


@app.command
def schedule(
    kind: Annotated[
        Literal["sequential", "parallel", "pipelined"],
        Parameter(help="sequential: Algorithm 1; parallel: Algorithm 2; pipelined: all busy, feedback late."),
    ] = "pipelined",
    *,
    blocks: Annotated[int, Parameter(help="K, the number of blocks.")] = 4,
    microbatches: Annotated[int, Parameter(help="Parts of a batch in the pipeline.")] = 1,
    latency: Annotated[int, Parameter(help="Every message takes up to so many ticks longer.")] = 0,
    lost: Annotated[float, Parameter(help="Share of the feedback messages that are lost.")] = 0.0,
    copies: Annotated[int, Parameter(help="How often feedback is sent, with the messages that follow.")] = 1,
    seed: Annotated[int, Parameter(help="Of the random latency and losses.")] = 0,
    ticks: Annotated[int, Parameter(help="How many ticks to show.")] = 12,
    draw: Annotated[bool, Parameter(help="A timeline instead of a list.", negative=())] = False,
) -> None:
    """Show who does what when, and how late the feedback is."""
    if ticks < 1:
        raise ValueError(f"--ticks is {ticks}; expected a whole number of at least 1")
    if kind != "pipelined" and (microbatches, latency, lost, copies) != (1, 0, 0.0, 1):
        raise ValueError("--microbatches, --latency, --lost and --copies are of the pipelined schedule: leave them out")
    if copies != 1 and not lost:
        raise ValueError("--copies has no effect without --lost: leave it out")

    def made() -> Iterator[schedules.Tick]:
        if kind == "pipelined":
            delay = schedules.Latency(latency, lost, seed, copies)
            return schedules.pipelined(blocks, microbatches=microbatches, latency=delay)
        return schedules.sequential(blocks) if kind == "sequential" else schedules.parallel(blocks)

    if draw:
        print(schedules.draw(made(), blocks, ticks))
    else:
        for now, tick in enumerate(itertools.islice(made(), ticks)):
            print(f"{now}:", ", ".join(f"{action} {batch} by {block}" for block, action, batch in tick))
    count = 200 * microbatches
    late = schedules.delays(made(), blocks, count)
    means = ", ".join(f"{sum(delay) / len(delay):.2g}" if delay else "-" for delay in late)
    print(f"updates between a block's forward and its backward, block 1 to {blocks}: {means}")
    if latency:
        busy = sum(action[:2] == (1, "forward") for tick in itertools.islice(made(), count) for action in tick)
        print(f"ticks in which the first block takes a batch in: {busy / count:.0%}")


@app.command(name="gap")
def gap_command(
    part: Annotated[
        Literal["table", "beyond"],
        Parameter(help="table: all forms on all kinds of networks. beyond: proximal steps that learn more per epoch."),
    ] = "table",
    options: StudyOptions = _STUDY_OPTIONS,
) -> None:
    """Measure the gap to backprop, with step sizes tuned alike on both sides; or what goes past it."""
    make = gap if part == "table" else beyond
    study = make(data_dir=options.data_dir, seeds=options.seeds, quick=options.quick)
    options.perform(study, "blockprop gap" + (" beyond" if part == "beyond" else ""))


def _show(folders: Sequence[Path], out: Path) -> None:
    check_folder(out)
    by_data: dict[str, list[Run]] = {}
    for finished in find_runs(folders):
        by_data.setdefault(finished.settings.data, []).append(finished)
    for data, runs in by_data.items():
        of_data = "-" + re.sub(r"[^\w.]+", "-", data).strip("-.") if len(by_data) > 1 else ""
        _show_runs(runs, out / f"comparison{of_data}.md", out / f"comparison{of_data}.png")


def _show_runs(runs: Sequence[Run], text: Path, figure: Path) -> None:
    made = groups(runs)
    parts = {"model": "{}", "data": "{}", "blocks": "K = {}"}
    found = {key: {run.config[key] for run in runs} for key in parts}
    title = ", ".join(part.format(*found[key]) for key, part in parts.items() if len(found[key]) == 1)
    Console(width=None if sys.stdout.isatty() else 120).print(table(made, title))
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text(markdown(made), encoding="utf-8")
    plot(made, figure, title)
    print(f"table and plot: {text}, {figure}")


def _variant(base: Settings, text: str) -> Settings:
    """Settings changed by words: short names (`backprop`, `published`, ...) and `key=value`."""
    changes: dict[str, Any] = {}
    tokens, keys = [], []
    known = {field.name for field in fields(Settings)}
    for word in text.split():
        key, equals, value = word.partition("=")
        name = key.replace("-", "_")
        if not equals and word in _SHORT:
            changes |= _SHORT[word]
        elif equals and name in known:
            keys.append(name)
            tokens += [f"--{name.replace('_', '-')}", *value.split(",")]
        else:
            raise ValueError(
                f"variant {text!r}: {word!r} is neither a short name ({', '.join(_SHORT)}) nor KEY=VALUE of a setting"
            )
    _, bound, _ = app.parse_args(["train", *tokens], print_error=False, exit_on_error=False)
    parsed = bound.arguments.get("settings", _DEFAULTS)
    made = replace(base, **changes, **{key: getattr(parsed, key) for key in keys})
    # what the base sets for other variants may be without effect here; what the variant itself sets may not
    for key, why in made.unused().items():
        if key in keys or key in changes:
            raise ValueError(f"variant {text!r}: {why}")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake becomes one line on standard error and exit status 2."""
    try:
        app(arguments, print_error=False, exit_on_error=False, result_action="return_value")
    except (ValueError, CycloptsError, OSError) as error:
        why = str(error)
        if isinstance(error, OSError) and error.filename and error.strerror:
            why = f"{error.filename}: {error.strerror}"
        print(f"blockprop: error: {' '.join(why.split())}", file=sys.stderr)
        return 2
    except LostError as error:
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # there, whoever failed says so on the same terminal
            print(f"blockprop: {' '.join(str(error).split())}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("blockprop: stopped; a run with a checkpoint continues with --resume", file=sys.stderr)
        return 130
    return 0


def run_and_exit() -> None:
    """The program: `main`, and its end even where threads still wait for neighbours that are gone."""
    code = main()
    if any(thread.name.startswith(EDGE_THREADS) for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run_and_exit()
