"""Starts a process for every block on this machine, shows them as one run, and ends them all, whatever happens."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from blockprop.experiments.board import Board
from blockprop.experiments.processes import join, places
from blockprop.experiments.settings import Settings
from blockprop.runtime import LostError, Place, Rendezvous
from blockprop.runtime.failure import PATIENCE
from blockprop.runtime.rendezvous import LOOPBACK

__all__ = ["launch"]


def launch(settings: Settings, out: Path, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Start a process for every block on this machine, show them as one, and end them all, whatever happens.

    Args:
        settings: the run's.
        out: the run's folder; empty or missing, unless resumed.
        resume: continue from the newest checkpoint that all processes have.
        quiet: show no progress.

    Returns:
        The summary of the run.

    Raises:
        ValueError: the one mistake or failure that ended the run.
    """
    # the folder is for what processes that are ended in the middle leave behind, too
    with _stopped_in_order(), TemporaryDirectory(prefix="blockprop-") as temporary:
        return _launch(settings, out, temporary, resume=resume, quiet=quiet)


@contextlib.contextmanager
def _stopped_in_order() -> Iterator[None]:
    """Being asked to end is as Ctrl-C is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _launch(settings: Settings, out: Path, temporary: str, *, resume: bool, quiet: bool) -> dict[str, Any]:
    rendezvous = Rendezvous((LOOPBACK, 0), host=True)
    children = {
        place: _start(settings, out, place, rendezvous.address, temporary, resume=resume) for place in places(settings)
    }
    try:
        with Board(rendezvous, places(settings)[:: settings.replicas], settings, quiet=quiet) as board:
            while all(child.poll() is None for child in children.values()):
                board.refresh()
                time.sleep(0.2)
            while any(child.poll() is None for child in children.values()) and not _broken(children):
                time.sleep(0.05)
            board.refresh()
            if broken := _broken(children):
                why = _why(rendezvous, broken)
                rendezvous.fail("the launcher", why)  # whoever was ended without a word has said nothing
    except BaseException:
        rendezvous.fail("the launcher", "stopped")
        raise
    finally:
        _end(children)
    if broken:
        raise ValueError(why)
    summary: dict[str, Any] = rendezvous.wait("summary", PATIENCE)
    return summary


def _start(
    settings: Settings, out: Path, place: Place, address: tuple[str, int], temporary: str, *, resume: bool
) -> subprocess.Popen[bytes]:
    rank = places(settings).index(place)
    task = {"settings": settings.as_dict(), "out": str(out), "rank": rank, "resume": resume, "temporary": temporary}
    threads = str(settings.threads or 1)
    quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # a lost neighbour is said in a line of our own
    environment = {**os.environ, **quiet, "TMPDIR": temporary, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    child = subprocess.Popen(
        [sys.executable, "-c", "from blockprop.experiments.launcher import child; child()"],
        stdin=subprocess.PIPE,
        env=environment,
        start_new_session=True,  # Ctrl-C is the launcher's to pass on
    )
    assert child.stdin is not None
    child.stdin.write(json.dumps({**task, "address": address}).encode() + b"\n")
    child.stdin.flush()  # and stays open: its end is the end of the launcher
    return child


def child() -> None:
    """The main program of a process that `launch` started: reads its task from standard input."""
    task = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_launcher, args=(task["temporary"],), daemon=True).start()
    settings = Settings.of_dict(task["settings"])
    place = places(settings)[task["rank"]]
    host, port = task["address"]

    def connect() -> Rendezvous:  # a launcher that is gone is noticed; one that is stopped, by Ctrl-Z, may go on
        return Rendezvous((host, port), silence=math.inf)

    try:
        join(settings, Path(task["out"]), place, connect, resume=task["resume"])
    except (ValueError, OSError, LostError):
        os._exit(2)  # the launcher says why; threads that wait for a neighbour are not waited for
    except BaseException:
        os._exit(1)
    os._exit(0)


def _end_with_launcher(temporary: str) -> None:
    sys.stdin.read()
    shutil.rmtree(temporary, ignore_errors=True)  # which a launcher that is gone cannot do
    os._exit(3)


def _broken(children: dict[Place, subprocess.Popen[bytes]]) -> dict[Place, int]:
    """The processes that have ended as they should not, and their status."""
    return {place: code for place, child in children.items() if (code := child.poll()) not in (None, 0)}


def _end(children: dict[Place, subprocess.Popen[bytes]]) -> None:
    """Let the processes end by themselves if they do, then end them."""
    living = list(children.values())
    for ask in (None, signal.SIGTERM, signal.SIGKILL):
        for one in living:
            if ask is not None:
                one.send_signal(ask)
        deadline = time.monotonic() + 1.0
        for one in living:
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.wait(max(0.01, deadline - time.monotonic()))
        living = [one for one in living if one.poll() is None]
    for one in children.values():
        if one.stdin is not None:
            one.stdin.close()


def _why(rendezvous: Rendezvous, broken: dict[Place, int]) -> str:
    """The one thing that went wrong first."""
    for place, code in broken.items():
        if code < 0:
            return f"the process of {place.name} was ended by signal {-code}, perhaps for lack of memory"
    failure = rendezvous.failure()
    if failure is None:
        place, code = next(iter(broken.items()))
        return f"the process of {place.name} ended with status {code}"
    return f"{failure['where']}: {failure['why']}"
