"""What went wrong first, in whichever process: how the others hear of it, and say it."""

import contextlib
import threading
import time
from collections.abc import Callable

from torch.distributed import DistError

from blockprop.runtime.rendezvous import Place, Rendezvous

__all__ = ["PATIENCE", "fail", "failure_of", "guard", "watch", "why_lost"]

PATIENCE = 3.0
"""Seconds that processes have to end by themselves once the run has failed or was stopped."""

BEAT, SILENCE = 0.25, 60.0
"""Seconds between signs of life, and without one after which a process counts as lost."""


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


def watch(
    rendezvous: Rendezvous, place: Place, finished: threading.Event, lose: Callable[[str], None]
) -> dict[str, str] | None:
    """Let what waits here know once the run has failed elsewhere; for a thread with a connection of its own.

    Args:
        rendezvous: the connection.
        place: of this process; it listens for signs of life of the next one.
        finished: set when the process has nothing more to lose.
        lose: ends what waits for a neighbour.

    Returns:
        The failure; None if there was none until the end.
    """
    pulse = _Pulse(rendezvous, place, finished)
    pulse.start()
    unanswered, before = 0, pulse.answers
    while (failure := pulse.failure) is None:
        if finished.wait(BEAT):
            pulse.join(1.0)
            return None
        unanswered, before = 0 if pulse.answers > before else unanswered + 1, pulse.answers
        if unanswered * BEAT >= rendezvous.silence:
            why = f"its process has not answered for {rendezvous.silence:g} seconds: frozen, or its machine is gone"
            rendezvous.know("store", why)
            failure = {"where": "store", "why": why}
            break
    lose("the run failed")
    return failure


def guard(
    rendezvous: Rendezvous,
    place: Place,
    finished: threading.Event,
    lose: Callable[[str], None],
    *,
    patience: float,
    end: Callable[[str], None],
) -> threading.Thread:
    """Watch in a thread of its own, and end a process that does not hear of the run's failure.

    Args:
        rendezvous: as in `watch`; the thread has another connection to it.
        place: as there.
        finished: as there.
        lose: as there.
        patience: seconds that the process has to end by itself.
        end: ends it, and may say why: in one line.
    """
    own = rendezvous.again()

    def look() -> None:
        failure = watch(own, place, finished, lose)
        if failure is not None and not finished.wait(patience):
            end(f"stopped, since {failure['where']} failed: {failure['why']}")

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    return thread


class _Pulse(threading.Thread):
    """Gives signs of life, and hears those of the next process, and of the run's failure.

    It may wait for ever where the store does not answer, which `answers` then tells. Silence is counted in calls and
    not in seconds: a process that was stopped itself has missed nothing.
    """

    def __init__(self, rendezvous: Rendezvous, place: Place, finished: threading.Event) -> None:
        super().__init__(name=f"pulse {place.name}", daemon=True)
        self.answers = 0
        self.failure: dict[str, str] | None = None
        self._rendezvous, self._place, self._finished = rendezvous, place, finished

    def run(self) -> None:
        own, other = f"alive/{self._place.name}", f"alive/{self._place.next.name}"
        heard, silent = None, 0
        while not self._finished.wait(BEAT):
            self.failure = failure_of(self._rendezvous)
            if self.failure is not None:
                return
            with contextlib.suppress(DistError, RuntimeError):  # the next look says whether the store is gone
                self._rendezvous.write(own, self.answers)
                before, heard = heard, self._rendezvous.read(other)
                silent = silent + 1 if heard == before and isinstance(heard, int) else 0
                if silent * BEAT >= SILENCE:
                    why = f"it has given no sign of life for {SILENCE:g} seconds: frozen, or its machine is gone"
                    self._rendezvous.fail(self._place.next.name, why)
                self.answers += 1
        with contextlib.suppress(DistError, RuntimeError):  # whoever served it may have left
            self._rendezvous.write(own, "done")


def why_lost(rendezvous: Rendezvous, place: Place, error: BaseException) -> str:
    """Where a neighbour is lost: what failed, and where. Whoever failed says so; it is given time to."""
    deadline = time.monotonic() + PATIENCE
    while (failure := failure_of(rendezvous)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    if failure is None:
        rendezvous.fail(place.name, f"a neighbour's process is gone without a word ({error}): killed, or no memory")
        failure = failure_of(rendezvous) or {"where": "store", "why": str(error)}
    return f"stopped, since {failure['where']} failed: {failure['why']}"
