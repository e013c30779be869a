"""Who opens the files of a folder, whichever process it is: told by the kernel (inotify)."""

import ctypes
import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Self

IN_OPEN = 0x20
# inotify(7): watch, mask, cookie, length of the name that follows.
HEAD = struct.Struct("iIII")


class Opened:
    """`with Opened(folder) as opened`: what in it is opened meanwhile, itself included."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Self:
        libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = libc.inotify_init1(os.O_NONBLOCK)
        if self.descriptor < 0 or libc.inotify_add_watch(self.descriptor, os.fsencode(self.folder), IN_OPEN) < 0:
            raise OSError(ctypes.get_errno(), "inotify")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.descriptor)

    def names(self) -> list[str]:
        """What was opened since the last look, in order; "" is the folder itself."""
        try:
            events = os.read(self.descriptor, 64 << 10)
        except BlockingIOError:
            return []
        found, at = [], 0
        while at < len(events):
            length = HEAD.unpack_from(events, at)[3]
            at += HEAD.size
            found.append(events[at : at + length].rstrip(b"\0").decode())
            at += length
        return found
