"""Training one network: in one process, in several, and what several leave behind."""

import os
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from blockprop.experiments.folder import read_json
from blockprop.experiments.processes import assembled, join, of_torchrun
from blockprop.experiments.run import checked, resumed, run
from blockprop.experiments.run import resume as resume_run
from blockprop.experiments.settings import Settings
from blockprop.runtime import Place, Rendezvous
from blockprop.runtime.rendezvous import LOOPBACK, listens_on, parse_address

__all__ = ["assemble", "train", "worker"]

_DEFAULTS = Settings()


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
    # torchrun's, or set by whoever starts the processes in its stead
    started = all(key in os.environ for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    if started and (joined := _joined(settings, out, resume=resume)).executor == "processes":
        _report(of_torchrun(joined, out, resume=resume, quiet=quiet, listen=listen or LOOPBACK), out)
        return
    if listen is not None:
        raise ValueError("--listen is for processes that torchrun starts: leave it out, or see blockprop worker")
    before = read_json(out / "summary.json") if resume and (out / "summary.json").exists() else {}
    summary = (resume_run if resume else run)(settings, out, quiet=quiet)
    if summary["steps"] == before.get("steps"):
        print("already finished; give more --epochs or --steps to continue: ", end="")
    _report(summary, out)


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
    wait: Annotated[
        float, Parameter(help="Seconds to wait for the store, and for each of the other processes.")
    ] = 60.0,
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
    store_listens = listens_on("--store", address[0], listen)
    place = Place(block, settings.blocks, replica, settings.replicas)
    summary = join(
        settings,
        out,
        place,
        lambda: Rendezvous(address, host=serving, listen=store_listens, timeout=wait, patience=wait),
        listen=listen,
        resume=resume,
        show=serving and not quiet,
        serving=serving,
        loud=True,
    )
    _report(summary, out)


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
