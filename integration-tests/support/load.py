"""Many requests at once, and what the same requests give alone."""

import threading
from dataclasses import dataclass
from typing import Any

from support.server import Answer, Server, wait_until

TEXTS = (
    "In the beginning God created",
    "The function returns",
    "To install the package, run",
    "A list is a",
    "SELECT name FROM",
    "And the LORD said unto Moses,",
    "The following example shows how to",
    "If the argument is omitted,",
)


@dataclass(frozen=True)
class Case:
    """One request: its prompt and its parameters."""

    inputs: str
    parameters: tuple[tuple[str, Any], ...]


def mixed_cases(count: int, max_new_tokens: int) -> list[Case]:
    """Greedy and seeded sampling in turn, with and without penalties, prompts of 5 to about 60 tokens.

    The end-of-sequence id is ignored, so that every answer is as long as asked.
    """
    cases = []
    for i in range(count):
        inputs = " ".join(TEXTS[(i + j) % len(TEXTS)] for j in range(1 + i % 5))
        parameters: dict[str, Any] = {"max_new_tokens": max_new_tokens, "ignore_eos_token": True}
        if i % 2:
            parameters |= {"do_sample": True, "temperature": 0.7 + 0.05 * (i % 9), "seed": 1000 + i}
        if i % 4 == 1:
            parameters |= {"top_p": 0.9}
        if i % 4 == 3:
            parameters |= {"top_k": 40}
        if i % 8 >= 6:
            parameters |= {"repetition_penalty": 1.2}
        cases.append(Case(inputs, tuple(parameters.items())))
    return cases


class Crowd:
    """Streams all cases at once, each in a thread; `answers` grow while it runs.

    No thread asks before all have started: the first would be hundreds of tokens ahead of the last on a busy machine.
    """

    def __init__(self, server: Server, cases: list[Case]) -> None:
        self.answers = [Answer() for _ in cases]
        self.failures: list[str] = []
        self.started = threading.Barrier(len(cases))
        self.threads = [
            threading.Thread(target=self._run, args=(server, i, case), daemon=True) for i, case in enumerate(cases)
        ]
        for thread in self.threads:
            thread.start()

    def _run(self, server: Server, i: int, case: Case) -> None:
        self.started.wait()
        try:
            self.answers[i] = server.stream(case.inputs, on_event=lambda a: self._note(i, a), **dict(case.parameters))
        except Exception as error:
            self.failures.append(f"case {i}: {error!r}")

    def _note(self, i: int, answer: Answer) -> None:
        self.answers[i] = answer

    def num_emitted(self) -> list[int]:
        return [len(answer.events) for answer in self.answers]

    def join(self, timeout_s: float = 180) -> list[Answer]:
        for thread in self.threads:
            thread.join(timeout_s)
            assert not thread.is_alive(), f"a stream hangs; emitted {self.num_emitted()}"
        assert not self.failures, self.failures
        return self.answers


def midway(server: Server, cases: list[Case], most: int, least: int = 1) -> tuple[Crowd, list[int]]:
    """A crowd of which every stream has emitted at least `least` and at most `most` tokens, and what each has emitted.

    A crowd whose fastest stream is too far before its slowest, as a busy machine makes it, is run to its end, and
    another one starts.
    """
    for _ in range(5):
        crowd = Crowd(server, cases)
        wait_until(lambda crowd=crowd: min(crowd.num_emitted()) >= least, 60, f"all streams emitted {least}")
        emitted = crowd.num_emitted()
        if max(emitted) <= most:
            return crowd, emitted
        crowd.join()
    raise AssertionError(f"five times too late to strike, the last time with {emitted}")


def alone(server: Server, cases: list[Case]) -> list[Answer]:
    """The answer of each case when nothing else runs."""
    return [server.stream(case.inputs, **dict(case.parameters)) for case in cases]


def assert_same(answers: list[Answer], golden: list[Answer], what: str) -> None:
    """Every stream equals its golden one: ids, texts, log-probabilities, finish reason, indices."""
    for i, (answer, expected) in enumerate(zip(answers, golden, strict=True)):
        assert answer.error is None, f"{what}: stream {i} ended with {answer.error}"
        if not answer.same_as(expected):
            pairs = zip(answer.events, expected.events, strict=False)
            differing = [(k, a, b) for k, (a, b) in enumerate(pairs) if a != b]
            first = differing[0] if differing else (len(answer.events), len(expected.events))
            raise AssertionError(f"{what}: stream {i} differs: (at, found, expected) = {first}")
