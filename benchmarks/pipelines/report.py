"""What is left: `results.json`, a page with the tables, and a figure."""

import json
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import blockprop
from benchmarks.measure import Spread, table
from benchmarks.pipelines import traffic
from benchmarks.pipelines.glance import glance
from benchmarks.pipelines.link import SPEEDS
from blockprop.checkpoint import write_atomically

_MB = 1e6
Row = dict[str, Any]
HEAD = (
    "",
    "samples/s",
    "x one thread",
    "examples to Q, x backprop",
    "time to Q, x one thread",
    "MB a step, up / down",
    "MB by the wire",
    "MB kept, lower / upper",
    "MB in flight",
)

ABOUT = """
Batch, model, data, optimizer, step size and warm-up (30 steps for the GPT, else none) are the same for all; two
processes of one thread each, on two cores, unless the row says otherwise. **Samples/s** and its ratio to one thread
doing plain backprop are medians (quartiles) over rounds in which all methods take their turn; start-up, the first steps
and evaluation are not counted. The ratio is to one thread in the same round, also where rows were measured anew later.

**Quality.** Q is the validation loss of one thread's backprop at 80 % of the budget, mean over seeds, at a constant
step size. It is reached at the first evaluation whose running median of three is at or below it; runs go on to twice
the budget, beyond that stands "> 2". Examples to Q are over backprop's. Time to Q is that, over the ratio of
samples/s: below 1 is faster than one thread.

**Whose curves are trained.** BlockProp's, in two processes. GPipe, 1F1B, ZBV and DDP take backprop's gradient: the
table "Is it backprop's gradient?" checks it, and their examples to Q are backprop's (marked "="). With BatchNorm they
are so only up to its statistics, which are those of a microbatch, or of DDP's half of a batch (marked "≈", and not
trained). The large batch has the curve of one process's backprop with that batch, at the best of its step sizes.
Copies and halves are ceilings and learn nothing: a half has no partner to hear from.

**Bytes** are those of tensors, counted, from the lower and from the upper process, in a step of the row's own batch;
"by the wire" is what the device of the slow link counted, with all headers. **Kept** are weights, gradients and
optimizer state; **in flight** is the most that waits for the backward pass at any one time. Copies of weights, which
`stashed` and cached rows keep, and the cache itself are in neither (`summary.json` has them). Speeds of cached rows are
taken on sixteen batches that come again, at a hundredth of the step size.
"""


def row(workload: str, link: str, name: str, found: Mapping[str, Any]) -> Row:
    """A row of `results.json`, from what a method's turns gave."""
    made = {"workload": workload, "method": name, "link": link, **found}
    if found.get("ratios"):
        made |= {
            "samples_per_second": statistics.median(found["rates"]),
            "ratio": statistics.median(found["ratios"]),
            "spread": list(_quartiles(found["ratios"])),
        }
    return made


def with_quality(made: Row, examples: Sequence[float], mark: str = "") -> Row:
    """The row with its examples and its time to Q.

    Args:
        made: the row.
        examples: to Q, over backprop's, one a seed; infinity if it was not reached.
        mark: "=" if they are backprop's, "≈" if up to the statistics of BatchNorm.
    """
    made = {**made, "examples": [None if math.isinf(one) else one for one in examples], "mark": mark}
    times = [one / ratio for one in examples if math.isfinite(one) for ratio in made.get("ratios", ())]
    if times:
        made |= {"time": statistics.median(times), "time_spread": list(_quartiles(times))}
    return made


def with_quality_of(made: Row, before: Row) -> Row:
    """The row with the examples to Q that an earlier measurement of it had, if it had any."""
    if "examples" not in before or "ratio" not in made:
        return made
    examples = [math.inf if one is None else one for one in before["examples"]]
    return with_quality({**made, **{key: before[key] for key in ("lr",) if key in before}}, examples, before["mark"])


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    spread = Spread.of(values)
    return spread.low, spread.high


def cells(made: Row) -> list[str]:
    """The row as it is shown."""
    if "ratio" not in made:
        return [made["method"], f"not measured: {made.get('failed', 'not run')}", *[""] * (len(HEAD) - 2)]
    sent, wire, memory = made.get("sent"), made.get("wire"), made.get("memory") or []
    return [
        made["method"],
        f"{made['samples_per_second']:.0f}",
        _ranged(made["ratio"], made["spread"]),
        _examples(made),
        _ranged(made["time"], made["time_spread"]) if "time" in made else "",
        " / ".join(f"{one / _MB:.2f}" for one in sent) if sent else "",
        " / ".join(f"{one / _MB:.2f}" for one in wire) if wire else "",
        " / ".join(f"{(one['weights'] + one['gradients'] + one['optimizer']) / _MB:.1f}" for one in memory),
        " / ".join(f"{one['activations'] / _MB:.1f}" for one in memory),
    ]


def _ranged(middle: float, spread: Sequence[float]) -> str:
    return f"{middle:.2f} ({spread[0]:.2f} to {spread[1]:.2f})"


def _examples(made: Row) -> str:
    if failed := made.get("quality_failed"):
        return f"not trained: {failed}"
    if "examples" not in made:
        return ""
    reached = [one for one in made["examples"] if one is not None]
    if not reached:
        return "> 2"
    never = len(made["examples"]) - len(reached)
    shown = f"{made['mark']}{statistics.median(reached):.2f}"
    if len(reached) > 1 and max(reached) > min(reached):
        shown += f" ({min(reached):.2f} to {max(reached):.2f})"
    return shown + (f"; {never} never" if never else "") + (f"; step size {made['lr']:g}" if "lr" in made else "")


def page(results: Mapping[str, Any], titles: Mapping[str, str], command: str) -> str:
    """The README."""
    parts = [
        "# Pipelines",
        f"    {command}\n\n{made_on()}",
        "![Speed and time to quality](pipelines.png)",
        ABOUT.strip(),
        *glance(results, titles),
    ]
    for name, title in titles.items():
        for speed in SPEEDS:
            group = results["groups"].get(f"{name}/{speed.name}")
            if group is None:
                continue
            parts.append(f"## {title}: {speed.title}")
            if "skipped" in group:
                parts.append(f"Not measured: the emulated link {group['skipped']}.")
                continue
            wanted = results["quality"].get(name)
            if wanted:
                parts.append(
                    f"Q = {wanted['level']:.4f}, which backprop reaches after {wanted['examples']:.0f} examples."
                )
            if group.get("measured"):
                parts.append(f"Measured with {group['measured']}")
            if carried := group.get("link"):
                parts.append(
                    f"When last measured, the link's program carried {carried['megabytes']:.0f} MB, dropped "
                    f"{carried['dropped']} packets, and took {carried['seconds']:.0f} s of a core."
                )
            parts.append(table(HEAD, [cells(made) for made in group["rows"].values()]))
    parts += [*_gradients(results, titles), *_traffic(results, titles)]
    return "\n\n".join(parts) + "\n"


def _gradients(results: Mapping[str, Any], titles: Mapping[str, str]) -> list[str]:
    checked = {name: found for name, found in results["verified"].items() if name in titles}
    methods = list(dict.fromkeys(method for found in checked.values() for method in found))
    if not methods:
        return []
    lines = [[method, *(_difference(found.get(method)) for found in checked.values())] for method in methods]
    return [
        "## Is it backprop's gradient?",
        "How far the weights are from those of one process's backprop after three steps in float64 on 16 examples, "
        "over how far they moved. BatchNorm's statistics are held fixed for this.",
        table(["", *(titles[name] for name in checked)], lines),
    ]


def _difference(value: float | str | None) -> str:
    return f"{value:.0e}" if isinstance(value, float) else value or ""


def _traffic(results: Mapping[str, Any], titles: Mapping[str, str]) -> list[str]:
    lines = []
    for name, facts in results["facts"].items():
        if name not in titles:
            continue
        numbers, batch = facts["boundaries"][facts["cut"]], facts["batch"]
        ours, theirs = traffic.pipeline(batch, [numbers]), traffic.data_parallel(facts["weights"])
        turn = traffic.reversal(facts["weights"], numbers)
        said = "less than DDP" if ours < theirs else "**more than DDP**"
        lines.append(
            [
                titles[name],
                facts["cut"],
                f"{ours / _MB:.2f}",
                f"{theirs / _MB:.2f}",
                f"{theirs / ours:.2f}",
                said,
                f"{turn:.0f}",
            ]
        )
    return [
        "## Traffic beside data parallelism",
        "Section 3 of the paper has blocks exchange less than data parallelism does. Blocks send a batch at the cut, "
        "which grows with the batch; data parallelism sends the gradients, which do not. So the claim reverses at the "
        "batch in the last column: above it, blocks send more. MB a step in each direction, float32, two workers.",
        table(
            ["", "cut", "blocks", "DDP", "DDP / blocks", "at this batch blocks send", "reverses at a batch of"], lines
        ),
    ] * bool(lines)


def made_on() -> str:
    """Versions, machine and date, in a sentence: of the page, and of a table when its rows were last measured."""
    versions = f"blockprop {blockprop.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    machine = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    load = f"load average {os.getloadavg()[0]:.1f} at the end"
    return f"{versions}; {machine}, {os.cpu_count()} cores, {load}; {datetime.now(UTC):%Y-%m-%d}."


def draw(results: Mapping[str, Any], titles: Mapping[str, str], out: Path) -> None:
    """Speed, and speed to quality, of every method, a panel for every workload and link."""
    from blockprop.studies.drawing import figure_of, save, tidy  # noqa: PLC0415 - needs matplotlib, which is optional

    panels = [
        (f"{titles[name]}\n{speed.title}", list(results["groups"][key]["rows"].values()))
        for name in titles
        for speed in SPEEDS
        if results["groups"].get(key := f"{name}/{speed.name}", {}).get("rows")
    ]
    if not panels:
        return
    columns = min(3, len(panels))
    figure, axes = figure_of(
        "Samples/s, and speed to backprop's quality, over one thread's", -(-len(panels) // columns), columns, height=4.6
    )
    for place, (title, made_rows) in zip(axes, panels, strict=False):
        rows = [made for made in made_rows if "ratio" in made][::-1]
        for index, made in enumerate(rows):
            low, high = made["spread"]
            error = [[made["ratio"] - low], [high - made["ratio"]]]
            place.barh(index + 0.2, made["ratio"], 0.36, xerr=error, color="C0", ecolor="0.4")
            if "time" in made:
                low, high = (1 / one for one in made["time_spread"][::-1])
                error = [[max(0.0, 1 / made["time"] - low)], [max(0.0, high - 1 / made["time"])]]
                place.barh(index - 0.2, 1 / made["time"], 0.36, xerr=error, color="C1", ecolor="0.4")
        place.axvline(1.0, color="k", linewidth=0.8)
        place.set_yticks(range(len(rows)), [made["method"] for made in rows], fontsize=7)
        place.set_title(title, fontsize=9)
        tidy(place)
    for place in axes[len(panels) :]:
        place.set_visible(False)
    axes[0].set_xlabel("blue: samples/s; orange: speed to Q")
    save(figure, out / "pipelines")


def write(results: Mapping[str, Any], titles: Mapping[str, str], out: Path, command: str) -> None:
    """Write all three; the figure where matplotlib is installed."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [made for group in results["groups"].values() for made in group.get("rows", {}).values()]
    write_atomically(out / "results.json", (json.dumps({**results, "rows": rows}, indent=1) + "\n").encode())
    write_atomically(out / "README.md", page(results, titles, command).encode())
    try:
        draw(results, titles, out)
    except ImportError:
        print("no figure: matplotlib is not installed")
