"""The heap of the C library while a checkpoint is read: what one tensor leaves is what the next one takes."""

import ctypes

# mallopt(3) of glibc.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_IN_HEAP = 32 << 20  # bytes; glibc takes no more, and comes to this by itself where tensors are so large

# Free bytes at the end of the heap that stay there: while a checkpoint is read, and otherwise (what glibc comes to).
KEPT_WHILE_READING, KEPT = 256 << 20, 2 * LARGEST_IN_HEAP


def keep_freed_memory() -> None:
    """From now on what is freed is used again. The system would give it anew, page by page, filled with zeros."""
    _call("mallopt", M_MMAP_THRESHOLD, LARGEST_IN_HEAP)
    _call("mallopt", M_TRIM_THRESHOLD, KEPT_WHILE_READING)


def give_back_memory() -> None:
    """Returns to the system what is free: with pieces of all sizes a heap grows to several times what is in use."""
    _call("malloc_trim", 0)


def end_of_reading() -> None:
    """Returns what reading has left, and keeps less from now on."""
    _call("mallopt", M_TRIM_THRESHOLD, KEPT)
    give_back_memory()


def _call(name: str, *values: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None)  # glibc alone has them
    if function is not None:
        function(*values)
