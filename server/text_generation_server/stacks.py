"""What every thread of this process is doing, for people who ask why it stands still."""

import contextlib
import os
import sys
import threading
import traceback


def print_stacks() -> None:
    """Writes the stacks of all threads to standard error.

    `faulthandler.register` does this without the interpreter's lock, and a thread that runs meanwhile takes its frames
    from under the reader: about one signal in thirty ended a process that imported torch.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        parts.append(f"Thread {ident:#x} {names.get(ident, 'of a library')} (most recent call last):\n")
        parts += traceback.format_stack(frame)
    # Who reads them may be gone, which ends nobody.
    with contextlib.suppress(OSError):
        os.write(2, "".join(parts).encode())
