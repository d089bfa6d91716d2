"""What every study asks on the command line, and how it is then carried out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from blockprop.studies.drawing import require_matplotlib
from blockprop.studies.publish import command_of, publish, write_tables
from blockprop.studies.study import Study, run_study

__all__ = ["StudyOptions"]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """What every study asks."""

    out: Annotated[Path | None, Parameter(help="The study's folder; a study that was stopped continues there.")] = None
    quick: Annotated[bool, Parameter(help="Minutes instead of hours, to see that it works.", negative=())] = False
    seeds: Annotated[
        tuple[int, ...], Parameter(help="Seeds of every row. Default: the study's.", consume_multiple=True, negative=())
    ] = ()
    jobs: Annotated[int, Parameter(help="Runs at a time, each in a process of its own.")] = 1
    data_dir: Annotated[Path | None, Parameter(help="Folder with the data's published files.")] = None
    redraw: Annotated[bool, Parameter(help="Run nothing: write tables and figure anew.", negative=())] = False
    quiet: Annotated[bool, Parameter(help="Show no progress.", negative=())] = False

    def perform(self, study: Study, command: str) -> None:
        """Make the runs that are missing, and write tables, figure and README.

        Raises:
            ValueError: matplotlib is not installed, the folder holds something else or, for a redrawing, nothing.
        """
        out = self.out or Path("studies") / (study.name + ("-quick" if self.quick else ""))
        command += "".join(
            text
            for given, text in (
                (self.quick, " --quick"),
                (self.seeds, " --seeds " + " ".join(map(str, self.seeds))),
                (self.jobs != 1, f" --jobs {self.jobs}"),
                (self.data_dir, " --data-dir DATA"),
                (True, f" --out {out.name}"),
            )
            if given
        )
        if self.redraw:
            command = command_of(out) or command
        require_matplotlib()
        study.check(out)
        if self.redraw and not (out / "runs").is_dir():
            raise ValueError(f"{out} holds no runs to draw; expected the --out of this study")
        if not self.redraw:
            run_study(
                study, out, jobs=self.jobs, quiet=self.quiet, on_row=lambda _row: write_tables(study, out, command)
            )
        publish(study, out, command)
        print(f"figure, tables and README: {out}")
