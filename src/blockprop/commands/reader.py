"""How a command line is read."""

import re
from collections.abc import Sequence
from typing import Any, get_args

from cyclopts import App, Parameter, Token, convert

__all__ = ["reader"]

_NUMBER = re.compile(r"[+-]?\d*\.?\d+")


def reader(**more: Any) -> App:
    """A program without commands, or a part of one; `more` is of cyclopts' own settings."""
    return App(
        default_parameter=Parameter(converter=_converted),
        help_on_error=False,
        suppress_keyboard_interrupt=False,  # the program says that the run can be continued
        **more,
    )


def _converted(hint: Any, tokens: Sequence[Token]) -> Any:
    """What was typed, as the type asked for; a whole number only if it is one, where the parser itself would round."""
    if int in (hint, *get_args(hint)) and float not in get_args(hint):
        for value in (token.value for token in tokens):
            if _NUMBER.fullmatch(value) and not float(value).is_integer():
                raise ValueError(f"{value} is not a whole number")
    return convert(hint, tokens)
