"""Memory that is mapped for one purpose and kept."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20


def own_memory(num_bytes: int) -> Tensor:
    """uint8 in pages of its own, large ones as far as whole ones fit. The system gives a page when it is written first.

    Among what loading makes and drops, what stays would keep the heap from shrinking.
    """
    pages = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    begin = -ctypes.addressof(ctypes.c_char.from_buffer(pages)) % HUGE_PAGE
    # Processors read ahead within a page, and have to look up fewer. The end stays in small ones, so that no memory is
    # held that nothing fills.
    if whole := num_bytes // HUGE_PAGE * HUGE_PAGE:
        pages.madvise(mmap.MADV_HUGEPAGE, begin, whole)
    return torch.frombuffer(pages, dtype=torch.uint8, count=num_bytes, offset=begin)
