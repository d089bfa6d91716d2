"""What a study leaves beside its runs: tables, a figure, and a README that says how they came about."""

import csv
import io
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from blockprop.checkpoint import write_atomically
from blockprop.metrics import read_metrics
from blockprop.studies.drawing import save
from blockprop.studies.study import Outcome, Study

__all__ = ["NOTE", "command_of", "markdown_table", "mean_gap", "percent", "publish", "spread", "write_tables"]

NOTE = "NOTE.md"
"""A file in a study's folder that its README takes up: what is to be known of these runs, such as of their data."""


def publish(study: Study, out: Path, command: str) -> None:
    """Write a study's `NAME-rows.csv`, `NAME-points.csv`, `NAME.png`, `NAME.svg` and `README.md`.

    Args:
        study: a study whose runs are in the folder, all or some of them.
        out: its folder.
        command: what was typed, for the README.
    """
    save(study.draw(study, study.outcomes(out)), out / study.name)
    write_tables(study, out, command)


def write_tables(study: Study, out: Path, command: str) -> None:
    """Write the tables and the README alone, as `publish` does; a figure of earlier is shown as it is."""
    outcomes = study.outcomes(out)
    _write_csv(out / f"{study.name}-rows.csv", (_row_record(outcome) for outcome in outcomes))
    points = (record for outcome in outcomes for record in _point_records(outcome))
    _write_csv(out / f"{study.name}-points.csv", points)
    write_atomically(out / "README.md", _readme(study, outcomes, command, out).encode())


def command_of(out: Path) -> str | None:
    """The command that made the runs of a folder, from its README; None without one."""
    path = out / "README.md"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.strip() for line in lines if line.startswith("    ")), None)


def _row_record(outcome: Outcome) -> dict[str, Any]:
    record: dict[str, Any] = {"panel": outcome.row.panel, "row": outcome.row.label, "lr": outcome.lr}
    record |= {"seeds": len(outcome.summaries), "diverged": outcome.diverged}
    for key in ("test_accuracy", "test_loss", "validation_accuracy", "validation_loss", "seconds"):
        values = outcome.values(key)
        record[f"{key}_mean"] = statistics.fmean(values) if values else None
        record[f"{key}_sd"] = statistics.stdev(values) if len(values) > 1 else None
    return record


def _point_records(outcome: Outcome) -> Iterable[dict[str, Any]]:
    """A record for each seed and evaluation, and the run's last figures in every one of them."""
    for seed, folder in outcome.folders.items():
        summary = outcome.summaries[seed]
        rows = read_metrics(folder / "metrics.jsonl")
        train = {row["step"]: row for row in rows if row["kind"] == "train"}
        for row in rows:
            if row["kind"] not in ("validation", "test"):
                continue
            beside = train.get(row["step"], {})
            yield {
                "panel": outcome.row.panel,
                "row": outcome.row.label,
                "seed": seed,
                "lr": outcome.lr,
                "step": row["step"],
                "epoch": row["epoch"],
                "evaluated": row["kind"],
                "accuracy": row["accuracy"],
                "loss": row["loss"],
                "train_loss": beside.get("loss"),
                "gluing_loss": sum(beside.get("gluing_loss") or []) if beside else None,
                "final_test_accuracy": summary.get("test_accuracy"),
                "final_test_loss": summary.get("test_loss"),
                "diverged": bool(summary.get("diverged")),
                "seconds": summary.get("seconds"),
            }


def _write_csv(path: Path, records: Iterable[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer: csv.DictWriter[str] | None = None
    for record in records:
        if writer is None:
            writer = csv.DictWriter(text, list(record), lineterminator="\n")
            writer.writeheader()
        writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in record.items()})
    write_atomically(path, text.getvalue().encode())


def spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    """Mean ± standard deviation; the value alone if there is one, a dash if there is none."""
    if not values:
        return "-"
    mean = show(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ± {show(statistics.stdev(values))}"


def percent(value: float) -> str:
    """A share, such as an accuracy, in percent."""
    return f"{100 * value:.2f}"


def mean_gap(one: Sequence[float], other: Sequence[float]) -> float:
    """By how much the mean of the one is above that of the other."""
    return statistics.fmean(one) - statistics.fmean(other)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "".join(f"| {' | '.join(line)} |\n" for line in [header, ["---"] * len(header), *rows])


def _readme(study: Study, outcomes: Sequence[Outcome], command: str, out: Path) -> str:
    parts = [f"# {study.title}", study.about.strip(), _made_by(outcomes, command)]
    if (out / NOTE).exists():
        parts.append((out / NOTE).read_text(encoding="utf-8").strip())
    if (out / f"{study.name}.png").exists():
        parts.append(f"![{study.title}]({study.name}.png)")
    done = sum(len(outcome.summaries) == len(study.seeds_of(outcome.row)) for outcome in outcomes)
    if done < len(outcomes):
        parts.append(f"**Unfinished**: {done} of {len(outcomes)} rows are there. The same command continues.")
    parts.append(study.tell(study, outcomes).strip())
    return "\n\n".join(part for part in parts if part) + "\n"


def _made_by(outcomes: Sequence[Outcome], command: str) -> str:
    runs = {
        folder: summary
        for outcome in outcomes
        for folder, summary in [
            *outcome.tuning.items(),
            *((folder, outcome.summaries[seed]) for seed, folder in outcome.folders.items()),
        ]
    }
    tuning = len({folder for outcome in outcomes for folder in outcome.tuning})
    hours = sum(summary.get("seconds", 0.0) for summary in runs.values()) / 3600
    count = f"{len(runs)} runs" + (f", {tuning} of them to choose step sizes" if tuning else "")
    made = "; ".join(
        f"{len(dates)} on {where}, {min(dates)}" + (f" to {max(dates)}" if min(dates) < max(dates) else "")
        for where, dates in _origins(runs.values()).items()
    )
    return f"    {command}\n\n{count}; {hours:.1f} hours of training, one thread a run. {made}."


def _origins(summaries: Iterable[dict[str, Any]]) -> dict[str, list[str]]:
    """Machines with their versions, and the dates of their runs."""
    found: dict[str, list[str]] = {}
    for summary in summaries:
        versions, origin = summary.get("versions", {}), summary.get("origin", {})
        said = ", ".join(f"{name} {versions[name]}" for name in ("blockprop", "python", "torch") if name in versions)
        machine = f"{origin['processor']}, {origin['cores']} cores" if origin else "a machine that was not recorded"
        where = machine + (f" ({said})" if said else "")
        found.setdefault(where, []).append(origin.get("date", "undated"))
    return found
