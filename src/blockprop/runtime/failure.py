"""What went wrong first, in whichever process: how the others hear of it, and say it."""

import threading
import time
from collections.abc import Callable

from blockprop.runtime.rendezvous import Place, Rendezvous

__all__ = ["PATIENCE", "failure_of", "watch", "why_lost"]

PATIENCE = 3.0
"""Seconds that processes have to end by themselves once the run has failed or was stopped."""


def failure_of(rendezvous: Rendezvous) -> dict[str, str] | None:
    """Keys "where" and "why"; None while all is well. A store that is gone is a failure as well."""
    try:
        return rendezvous.failure()
    except Exception:
        return {"where": "store", "why": "the process that serves the store is gone"}


def watch(
    rendezvous: Rendezvous,
    finished: threading.Event,
    lose: Callable[[str], None],
    found: dict[str, str] | None = None,
) -> dict[str, str] | None:
    """Let what waits here know once the run has failed elsewhere; for a thread with a connection of its own.

    Args:
        rendezvous: the connection.
        finished: set when the process has nothing more to lose.
        lose: ends what waits for a neighbour.
        found: takes up the failure before that: the store may be gone when it is asked for again.

    Returns:
        The failure; None if there was none until the end.
    """
    while (failure := failure_of(rendezvous)) is None:
        if finished.wait(0.25):
            return None
    if found is not None:
        found |= failure
    lose("the run failed")
    return failure


def why_lost(rendezvous: Rendezvous, place: Place, error: BaseException, found: dict[str, str] | None = None) -> str:
    """Where a neighbour is lost: what failed, and where. Whoever failed says so; it is given time to.

    Args:
        rendezvous: where it is looked up.
        place: of this process.
        error: what was seen here.
        found: the failure, if it is known already.
    """
    deadline = time.monotonic() + PATIENCE
    while (failure := found or failure_of(rendezvous)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    if failure is None:
        rendezvous.fail(place.name, f"a neighbour's process is gone without a word ({error}): killed, or no memory")
        failure = failure_of(rendezvous) or {"where": "store", "why": str(error)}
    return f"stopped, since {failure['where']} failed: {failure['why']}"
