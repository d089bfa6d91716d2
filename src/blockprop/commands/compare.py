"""Several runs beside each other: made, and shown."""

import re
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from blockprop.commands.reader import reader
from blockprop.experiments.comparison import Planned
from blockprop.experiments.comparison import compare as run_comparison
from blockprop.experiments.folder import check_folder
from blockprop.experiments.report import Run, find_runs, groups, markdown, plot, table
from blockprop.experiments.settings import Settings
from blockprop.forms import FormName

__all__ = ["compare", "report"]

_DEFAULTS = Settings()
_settings_of = reader()
_SHORT = {
    "backprop": {"algorithm": "backprop"},
    "blockprop": {"algorithm": "blockprop"},
    **{name: {"algorithm": "blockprop", "form": name} for name in FormName.__args__},  # type: ignore[attr-defined]
}


@_settings_of.default
def _given(settings: Settings = _DEFAULTS) -> Settings:
    return settings


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
    parsed = _settings_of(tokens, print_error=False, exit_on_error=False, result_action="return_value")
    made = replace(base, **changes, **{key: getattr(parsed, key) for key in keys})
    # what the base sets for other variants may be without effect here; what the variant itself sets may not
    for key, why in made.unused().items():
        if key in keys or key in changes:
            raise ValueError(f"variant {text!r}: {why}")
    return made
