"""The results of one stream between the thread that computes them and those that send them."""

import queue

MAX_QUEUED = 16
# How late the end of a stream or of a call may be noticed by a thread that waits for something else.
POLL_S = 0.5


class Stream:
    """One Run call: the results that gRPC has not sent, and whether anybody still wants them."""

    def __init__(self) -> None:
        self.epoch = 0
        self.results: queue.Queue[bytes | Exception] = queue.Queue(MAX_QUEUED)
        self.is_closed = False

    def put(self, result: bytes | Exception) -> None:
        """Hands a result to gRPC. Waits for a router that reads slowly, not for one that is gone."""
        while not self.is_closed:
            try:
                return self.results.put(result, timeout=POLL_S)
            except queue.Full:
                continue
        return None

    def get(self) -> bytes | Exception | None:
        """The next result; None if the stream has been closed and no result is left."""
        while True:
            was_closed = self.is_closed
            try:
                return self.results.get(timeout=POLL_S)
            except queue.Empty:
                if was_closed:
                    return None
