"""The published studies: the paper's figures, and the gap to backprop."""

from typing import Annotated, Any, Literal

from cyclopts import Parameter

from blockprop.studies.beyond import beyond
from blockprop.studies.figure2 import figure2
from blockprop.studies.figure3 import figure3
from blockprop.studies.gap import gap
from blockprop.studies.options import StudyOptions

__all__ = ["figure", "gap_command"]

_STUDY_OPTIONS = StudyOptions()


def figure(
    number: Annotated[Literal[2, 3], Parameter(help="2: MNIST, over N_h and λ. 3: ResNet18 on CIFAR-10.")],
    options: StudyOptions = _STUDY_OPTIONS,
    *,
    width: Annotated[int | None, Parameter(help="Figure 3: width of the network. Default: 64.")] = None,
    epochs: Annotated[int | None, Parameter(help="Epochs. Default: 3 for figure 2, 10 for figure 3.")] = None,
    train_size: Annotated[int | None, Parameter(help="Figure 3: training images. Default: all.")] = None,
) -> None:
    """Run a figure of the paper, with the baselines and rows that explain it."""
    sizes = {"width": width, "epochs": epochs, "train_size": train_size}
    given: dict[str, Any] = {key: value for key, value in sizes.items() if value is not None}
    if number == 2 and (wrong := given.keys() - {"epochs"}):
        raise ValueError(f"--{min(wrong).replace('_', '-')} is of figure 3; leave it out")
    for key, value in given.items():
        if value < 1:
            raise ValueError(f"--{key.replace('_', '-')} is {value}; expected a whole number of at least 1")
    make = figure2 if number == 2 else figure3
    study = make(data_dir=options.data_dir, seeds=options.seeds, quick=options.quick, **given)
    words = "".join(f" --{key.replace('_', '-')} {value}" for key, value in given.items())
    options.perform(study, f"blockprop figure {number}{words}")


def gap_command(
    part: Annotated[
        Literal["table", "beyond"],
        Parameter(help="table: all forms on all kinds of networks. beyond: proximal steps that learn more per epoch."),
    ] = "table",
    options: StudyOptions = _STUDY_OPTIONS,
) -> None:
    """Measure the gap to backprop, with step sizes tuned alike on both sides; or what goes past it."""
    make = gap if part == "table" else beyond
    study = make(data_dir=options.data_dir, seeds=options.seeds, quick=options.quick)
    options.perform(study, "blockprop gap" + (" beyond" if part == "beyond" else ""))
