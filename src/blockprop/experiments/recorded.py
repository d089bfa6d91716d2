"""Settings as an older run, or another program, has recorded them: their names then, and their types."""

from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from blockprop.experiments.optimizers import USUAL_MOMENTUM

__all__ = ["check_types", "under_todays_names"]


def under_todays_names(recorded: dict[str, Any]) -> dict[str, Any]:
    """What older runs recorded, as it would be recorded now."""
    if "lr_schedule" not in recorded and "schedule" in recorded:
        recorded = {**recorded, "lr_schedule": recorded["schedule"], "schedule": None}
    older = "copies" not in recorded
    if older and recorded.get("optimizer") in ("adam", "adamw", "nadam") and recorded.get("momentum") == 0:
        recorded = {**recorded, "momentum": USUAL_MOMENTUM["adam"]}  # β1 was not theirs to set
    if older and recorded.get("lost"):
        recorded = {**recorded, "copies": 1}  # feedback was sent once
    if "trust" not in recorded and recorded.get("feedback") == "target" and recorded.get("schedule") == "pipelined":
        recorded = {**recorded, "trust": "none"}  # corrections had no limit
    if recorded.get("policy") == "free-running" and recorded.get("schedule") == "pipelined":
        recorded = {**recorded, "microbatches": recorded.get("microbatches") or 1}  # batches were whole
    return recorded


def check_types(recorded: dict[str, Any], hints: dict[str, Any]) -> None:
    """Refuse values, as they come from JSON, that are not of their setting's type.

    Raises:
        ValueError: one is not.
    """
    for key, hint in hints.items():
        if key in recorded and not _fits(recorded[key], hint):
            raise ValueError(f"{recorded[key]!r} for {key}")


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_fits(item, arguments[0]) for item in value)
    if hint in (int, float) and isinstance(value, bool):
        return False
    kinds: Any = {float: (int, float), Path: (str, Path)}.get(hint, hint)
    return isinstance(value, kinds)
