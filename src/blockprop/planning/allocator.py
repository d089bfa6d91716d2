"""What the C library does with memory that is freed: give it back to the system, or keep it.

glibc gives large pieces back, and how large a piece must be follows from the largest that was freed so far. New pages
cost time when they are first touched: a batch costs less after a larger one than in a process of its own.
"""

import ctypes

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt, in malloc.h


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, so that what is measured does not depend on what was measured before.

    Returns:
        Whether it does: False where the C library is another than glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))
