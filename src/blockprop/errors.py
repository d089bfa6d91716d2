"""Errors of others, in a line."""

__all__ = ["first_line"]


def first_line(error: BaseException) -> str:
    """What an error says, cut to its first line; its kind where it says nothing."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
