"""A run's folder: what is written there, and how it is read back."""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy
import torch

import blockprop
from blockprop.checkpoint import write_atomically
from blockprop.experiments.settings import Settings
from blockprop.metrics import finite

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["check_empty", "check_folder", "claimed", "origin", "read_json", "settings_of", "versions", "write_json"]


def check_folder(out: Path) -> None:
    """Refuse a folder that cannot be made because a file is in its place.

    Raises:
        ValueError: it, or a folder it would be in, is a file.
    """
    for path in (out, *out.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file, not a folder; name another --out")


def check_empty(out: Path) -> None:
    """Refuse a folder for a new run that has something in it.

    Raises:
        ValueError: it has, or a file is in its place.
    """
    check_folder(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} already holds a run or other files; name another --out, or continue it with --resume")


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Keep a run's folder to this process while it writes there; the folder is made if need be.

    Where the system has no locks of this kind, nothing is kept.

    Raises:
        ValueError: another process writes there.
    """
    out.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is training in {out}; wait for its end, or name another --out"
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(folder)


def settings_of(out: Path) -> Settings:
    """The settings recorded in a run's folder, resolved; what an older run did not record is at its default.

    Raises:
        ValueError: there is no run, or its configuration is not one of ours.
    """
    recorded = read_json(out / "config.json")
    if missing := {"data", "model", "algorithm", "seed"} - recorded.keys():
        raise ValueError(f"{out / 'config.json'} lacks {min(missing)!r}; expected one written by a run")
    try:
        settings = Settings.of_dict(recorded)
    except ValueError as error:
        raise ValueError(f"{out / 'config.json'} has {error}; expected one written by a run") from error
    return settings.resolved()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: the file is missing or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"there is no {path}; expected the folder of a run") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); expected a file written by a run") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object; expected a file written by a run")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object to a file, atomically; NaN and infinity become null."""
    write_atomically(path, (json.dumps(finite(content), indent=2) + "\n").encode())


def versions() -> dict[str, str]:
    """Of what a run's numbers depend on."""
    return {
        "blockprop": blockprop.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }


def origin() -> dict[str, Any]:
    """Where and when a run was made: processor, its cores, and the day in UTC."""
    return {"processor": _processor(), "cores": os.cpu_count(), "date": f"{datetime.now(UTC):%Y-%m-%d}"}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
