"""The command line: its commands, and what becomes of their errors."""

import os
import sys
import threading
from collections.abc import Sequence

from cyclopts import CycloptsError

from blockprop import __version__
from blockprop.commands.compare import compare, report
from blockprop.commands.figure import figure, gap_command
from blockprop.commands.plan import cost, plan_command
from blockprop.commands.reader import reader
from blockprop.commands.schedule import schedule
from blockprop.commands.train import assemble, train, worker
from blockprop.runtime import LostError
from blockprop.runtime.edge import EDGE_THREADS

__all__ = ["app", "main"]

app = reader(
    name="blockprop", help="Train neural networks as decoupled blocks, glued by a penalty.", version=__version__
)
for command in (train, worker, assemble, compare, report, cost, figure, schedule):
    app.command(command)
app.command(plan_command, name="plan")
app.command(gap_command, name="gap")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake becomes one line on standard error and exit status 2."""
    try:
        app(arguments, print_error=False, exit_on_error=False, result_action="return_value")
    except (ValueError, CycloptsError, OSError) as error:
        why = str(error)
        if isinstance(error, OSError) and error.filename and error.strerror:
            why = f"{error.filename}: {error.strerror}"
        print(f"blockprop: error: {' '.join(why.split())}", file=sys.stderr)
        return 2
    except LostError as error:
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # there, whoever failed says so on the same terminal
            print(f"blockprop: {' '.join(str(error).split())}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("blockprop: stopped; a run with a checkpoint continues with --resume", file=sys.stderr)
        return 130
    return 0


def run_and_exit() -> None:
    """The program: `main`, and its end even where threads still wait for neighbours that are gone."""
    code = main()
    if any(thread.name.startswith(EDGE_THREADS) for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run_and_exit()
