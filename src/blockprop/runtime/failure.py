"""What went wrong first, in whichever process: how the others hear of it, and say it."""

import threading
import time
from collections.abc import Callable

from blockprop.runtime.rendezvous import Place, Rendezvous

__all__ = ["PATIENCE", "fail", "failure_of", "watch", "why_lost"]

PATIENCE = 3.0
"""Seconds that processes have to end by themselves once the run has failed or was stopped."""


def fail(rendezvous: Rendezvous, place: Place, why: str, *, serving: bool) -> None:
    """Say what went wrong here, unless another process has said so before.

    Args:
        rendezvous: where it is said.
        place: of this process.
        why: in one line.
        serving: whether this process serves the store. It then stays a second: with it goes what the others look up.
    """
    rendezvous.fail(place.name, why)
    if serving:
        time.sleep(1.0)


def failure_of(rendezvous: Rendezvous) -> dict[str, str] | None:
    """Keys "where" and "why"; None while all is well. A store that is gone is a failure as well."""
    try:
        return rendezvous.failure()
    except Exception:
        return {"where": "store", "why": "the process that serves the store is gone"}


def watch(rendezvous: Rendezvous, finished: threading.Event, lose: Callable[[str], None]) -> dict[str, str] | None:
    """Let what waits here know once the run has failed elsewhere; for a thread with a connection of its own.

    Args:
        rendezvous: the connection.
        finished: set when the process has nothing more to lose.
        lose: ends what waits for a neighbour.

    Returns:
        The failure; None if there was none until the end.
    """
    while (failure := failure_of(rendezvous)) is None:
        if finished.wait(0.25):
            return None
    lose("the run failed")
    return failure


def why_lost(rendezvous: Rendezvous, place: Place, error: BaseException) -> str:
    """Where a neighbour is lost: what failed, and where. Whoever failed says so; it is given time to."""
    deadline = time.monotonic() + PATIENCE
    while (failure := failure_of(rendezvous)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    if failure is None:
        rendezvous.fail(place.name, f"a neighbour's process is gone without a word ({error}): killed, or no memory")
        failure = failure_of(rendezvous) or {"where": "store", "why": str(error)}
    return f"stopped, since {failure['where']} failed: {failure['why']}"
