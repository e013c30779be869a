"""One row for each admitted sequence: its log, its blocks, how far it is computed. Integers in arrays, no tensors.

A structure of arrays, so that a step over many rows is a few array operations, and nothing grows with the context.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .sampling.constraint import Constraint
from .sampling.params import SamplingParams


class ProtocolError(RuntimeError):
    """A plan that does not fit what this shard holds: the stream cannot go on."""


@dataclass(frozen=True)
class RowFault:
    """Why a sequence cannot go on: `kind` is the name of one of the wire's RowError.Kind."""

    kind: str
    message: str


@dataclass(slots=True)
class RowState:
    """What only some rows need: everything that is not a number in an array."""

    params: SamplingParams
    constraint: Constraint | None = None
    counts: Tensor | None = None  # [2, vocab] float32: occurrences in the whole log, and in generated ids
    prompt_logprobs_from: int | None = None  # the first id of the prompt whose log-probability is wanted


class SequenceTable:
    """The sequences that this rank holds, by row."""

    def __init__(self, num_rows: int, max_positions: int, block_size: int, vocab_size: int) -> None:
        self.block_size, self.vocab_size = block_size, vocab_size
        self.max_blocks = -(-max_positions // block_size)
        # Zero pages are committed by the operating system as they are written.
        self.tokens = np.zeros((num_rows, max_positions + 1), np.int32)
        self.block_table = np.zeros((num_rows, self.max_blocks), np.int32)
        self.sequence = np.zeros(num_rows, np.uint64)
        self.incarnation = np.zeros(num_rows, np.uint32)
        self.length = np.zeros(num_rows, np.int64)  # ids in the log
        self.computed = np.zeros(num_rows, np.int64)  # positions in the cache
        self.num_prompt = np.zeros(num_rows, np.int64)
        self.num_blocks = np.zeros(num_rows, np.int64)
        self.blocks_digest = np.zeros(num_rows, np.uint64)
        self.is_held = np.zeros(num_rows, np.bool_)
        self.faults: dict[int, RowFault] = {}
        self.states: dict[int, RowState] = {}

    @property
    def num_held(self) -> int:
        """Rows in use."""
        return int(self.is_held.sum())

    def admit(
        self, row: int, sequence: int, incarnation: int, tokens: Sequence[int], num_prompt: int, cached_len: int
    ) -> None:
        """Takes a sequence with its whole log into a free row."""
        if not 0 <= row < len(self.is_held) or self.is_held[row]:
            raise ProtocolError(f"row {row} is not free, or not below {len(self.is_held)}")
        if not 0 < num_prompt <= len(tokens) < self.tokens.shape[1]:
            raise ProtocolError(f"row {row}: {len(tokens)} ids, {num_prompt} of them the prompt")
        if cached_len % self.block_size or cached_len >= len(tokens):
            raise ProtocolError(f"row {row}: {cached_len} of {len(tokens)} positions cannot be cached already")
        log = np.fromiter(tokens, np.int64, len(tokens))
        if log.max() >= self.vocab_size:
            raise ProtocolError(f"row {row}: id {log.max()} is not below the vocabulary's {self.vocab_size}")
        self.tokens[row, : len(log)] = log
        self.sequence[row], self.incarnation[row] = sequence, incarnation
        self.length[row], self.computed[row] = len(tokens), cached_len
        self.num_prompt[row], self.num_blocks[row] = num_prompt, 0
        self.blocks_digest[row] = 0
        self.is_held[row] = True

    def check_row(self, row: int, incarnation: int) -> None:
        """Raises unless the row holds that incarnation."""
        if not 0 <= row < len(self.is_held) or not self.is_held[row] or self.incarnation[row] != incarnation:
            raise ProtocolError(f"row {row} does not hold incarnation {incarnation}")

    def add_blocks(self, row: int, ids: Iterable[int]) -> None:
        """Appends to the row's block table."""
        for block in ids:
            at = int(self.num_blocks[row])
            if at == self.max_blocks:
                raise ProtocolError(f"row {row} has more than {self.max_blocks} blocks")
            self.block_table[row, at] = block
            self.num_blocks[row] = at + 1
            mixed = (int(self.blocks_digest[row]) ^ (block + 1)) * 0x9E3779B97F4A7C15
            self.blocks_digest[row] = (mixed ^ (mixed >> 29)) & 0xFFFFFFFFFFFFFFFF

    def append(self, rows: NDArray[np.int64], token_ids: NDArray[np.int64]) -> None:
        """Adds a generated id to the log of each row: both [n], no row twice."""
        at = self.length[rows]
        if (at >= self.tokens.shape[1]).any():
            raise ProtocolError(f"rows {rows[at >= self.tokens.shape[1]].tolist()} are at their last position")
        self.tokens[rows, at] = token_ids
        self.length[rows] = at + 1
        for row, token_id in zip(rows.tolist(), token_ids.tolist(), strict=True):
            state = self.states.get(row)
            if state is not None and state.counts is not None:
                state.counts[:, token_id] += 1

    def count_ids(self, row: int) -> Tensor:
        """Occurrences of every id in the row's log, and in its generated part: [2, vocab] float32."""
        log = torch.from_numpy(self.tokens[row, : self.length[row]].astype(np.int64))
        counts = torch.zeros(2, self.vocab_size)
        for part, ids in zip(counts, (log, log[int(self.num_prompt[row]) :]), strict=True):
            part.index_add_(0, ids, torch.ones(len(ids)))
        return counts

    def log(self, row: int) -> NDArray[np.int32]:
        """The row's ids: prompt, then generated."""
        return self.tokens[row, : self.length[row]]

    def release(self, row: int) -> None:
        """Forgets a sequence."""
        if not 0 <= row < len(self.is_held) or not self.is_held[row]:
            raise ProtocolError(f"row {row} is released but not held")
        self.is_held[row] = False
        self.faults.pop(row, None)
        self.states.pop(row, None)

    def facts(self, rows: NDArray[np.int64], step: int) -> bytes:
        """What all ranks must agree on about these rows, as bytes.

        Beside the digest of the block ids as they came, one entry of each row's table and log as it stands, another one
        in each step: all of them would be work that grows with the context.
        """
        spot = (step * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF) >> 33
        length, num_blocks = self.length[rows], self.num_blocks[rows]
        columns = (
            rows,
            self.sequence[rows],
            self.incarnation[rows],
            length,
            self.computed[rows],
            num_blocks,
            self.blocks_digest[rows],
            self.tokens[rows, np.maximum(length - 1, 0)],
            self.block_table[rows, spot % np.maximum(num_blocks, 1)],
            self.tokens[rows, spot % np.maximum(length, 1)],
        )
        return b"".join(column.tobytes() for column in columns)
