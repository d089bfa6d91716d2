"""Learning under delay: late feedback of every kind beside backprop, by quality and by examples to quality.

Every run is a simulation of the pipeline, tick by tick, in one process. The studies of a task: `methods`, all of
them at K = 4, each with three step sizes on one seed; `finals`, backprop with and without a warm-up, the delayed
gradient, the default, also at backprop's step size and with messages that are late or lost, and the three best methods
at K = 2, 4, 8 on three seeds; `stable`, how large a step size may be; `longer`, many steps with a decaying step size;
`cached`, feedback that is computed on every E-th visit only. A run that is finished is never made again, and one that
was stopped goes on.
"""

import argparse
from pathlib import Path

from benchmarks.delay import studies
from benchmarks.delay.tasks import tasks
from blockprop.studies.publish import publish, write_tables
from blockprop.studies.study import Study, run_study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the shape of the tables in minutes, not to quote")
    parser.add_argument("--out", type=Path, default=Path("studies/delay"), help="folder of runs, tables and figures")
    parser.add_argument("--data-dir", type=Path, help="folder with the data's published files")
    parser.add_argument("--tasks", nargs="+", choices=["mlp", "gpt", "muon", "resnet"], help="default: all")
    parser.add_argument("--studies", nargs="+", choices=studies.ALL, help="default: all, with --quick the first two")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--redraw", action="store_true", help="run nothing: write tables and figures anew")
    given = parser.parse_args()
    for task in tasks(given.data_dir, quick=given.quick):
        if given.tasks and task.name not in given.tasks:
            continue
        for name in studies.names(task):
            if given.studies and name not in given.studies:
                continue
            # the step sizes of the other studies are chosen in the first
            outcomes = studies.tuning(task).outcomes(given.out / task.name / "methods")
            study = studies.study(name, task, outcomes)
            if study is None:
                print(f"{task.name}: {name} waits for the study methods, which is not finished")
            else:
                _carry_out(study, given.out / task.name / name, given)


def _carry_out(study: Study, out: Path, given: argparse.Namespace) -> None:
    command = (
        "python -m benchmarks.delay" + " --quick" * given.quick + f" --tasks {out.parent.name} --studies {out.name}"
    )
    if not given.redraw:
        out.mkdir(parents=True, exist_ok=True)
        run_study(study, out, jobs=given.jobs, on_row=lambda _row: write_tables(study, out, command))
    publish(study, out, command)
    print(f"figure, tables and README: {out}")


if __name__ == "__main__":
    main()
