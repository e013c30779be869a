"""Which shapes an operation may be called with so that a row's bits do not depend on the rows around it.

Libraries choose another order of summation for another number of rows, silently and per shape. So every shape that is
used is first compared, bit by bit, with the smallest one on data made to show the order: each product has a counterpart
of opposite sign elsewhere in the sum, so that exact sums are zero and what is left is the rounding of one order alone,
visible in bfloat16 too.
"""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Multiply = Callable[[Tensor], Tensor]

BASE_ROWS = 4
ROW_COUNTS = (1, 2, 8, 16, 32, 64, 128, 256, 512)
# Rows x in x out features of the largest product that is tried: 0.1 to 1 s.
MAX_PRODUCT = 1 << 34


# Columns of a probe that differ from each other; more are these again. A probe is as large as the weight it stands for.
DISTINCT_COLUMNS = 61


def cancelling(rows: int, size: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """x [rows, size] and w [columns, size], exact in bfloat16, whose x @ w.T is zero in exact arithmetic."""
    generator = torch.Generator().manual_seed(size * 1_000_003 + columns)
    x = torch.randn(rows, size, generator=generator).bfloat16().float()
    w = torch.randn(min(columns, DISTINCT_COLUMNS), size, generator=generator).bfloat16().float()
    order, half = torch.randperm(size, generator=generator), size // 2
    x[:, order[half : 2 * half]] = x[:, order[:half]]
    w[:, order[half : 2 * half]] = -w[:, order[:half]]
    return x.to(dtype), w.to(dtype).index_select(0, torch.arange(columns) % len(w))


def proven_row_counts(multiply: Callable[[Tensor], Tensor], x: Tensor) -> tuple[int, ...]:
    """Numbers of rows at which `multiply` gives every row the bits that it has among four, whatever its place.

    x: as many rows as the largest count to be tried. Empty if not even the place among four is without influence.
    """

    def in_pieces(rows: int, count: int, first: int = 0) -> Tensor:
        return torch.cat([multiply(x[i : i + count]) for i in range(first, rows - count + 1, count)])

    small = in_pieces(4 * BASE_ROWS, BASE_ROWS)
    for first in range(1, BASE_ROWS):
        moved = in_pieces(4 * BASE_ROWS, BASE_ROWS, first)
        if not torch.equal(moved, small[first : first + len(moved)]):
            return ()
    proven = [BASE_ROWS]
    for count in ROW_COUNTS:
        if count < BASE_ROWS:
            ok = torch.equal(in_pieces(4 * BASE_ROWS, count), small)
        elif count <= len(x):
            ok = torch.equal(multiply(x[:count]), in_pieces(count, max(p for p in proven if count % p == 0)))
        else:
            break
        if ok:
            proven.append(count)
    return tuple(sorted(proven))


class RowSplitter:
    """How any number of rows is divided into proven counts, the last ones padded, at the least cost."""

    # What one more call costs, in rows: reading the weight again.
    CALL_ROWS = 16

    def __init__(self, counts: Sequence[int]):
        self.counts, self.largest = frozenset(counts), max(counts)
        best: list[tuple[int, int]] = [(0, 0)]  # cost of so many rows, and the count to begin with
        for rows in range(1, 2 * self.largest + 1):
            best.append(min((count + self.CALL_ROWS + best[max(0, rows - count)][0], count) for count in counts))
        self._first = [count for _, count in best]

    def split(self, rows: int) -> list[int]:
        pieces = []
        while rows > 0:
            pieces.append(self.largest if rows >= len(self._first) else self._first[rows])
            rows -= pieces[-1]
        return sorted(pieces, reverse=True)


class Proofs:
    """At which numbers of rows products are stable: proven once for each kind and shape."""

    def __init__(self) -> None:
        self.row_stable = True
        self._counts: dict[tuple[object, int, int, torch.dtype, int], tuple[int, ...]] = {}
        self._splitters: dict[tuple[int, ...], RowSplitter] = {}

    def __call__(
        self, kind: object, in_: int, out: int, dtype: torch.dtype, make: Callable[[Tensor], Multiply]
    ) -> RowSplitter:
        """make: the product with a weight [out, in]. Weights of one kind and shape are multiplied alike."""
        key = (kind, in_, out, dtype, torch.get_num_threads())
        if key not in self._counts:
            most = max(4 * BASE_ROWS, max((c for c in ROW_COUNTS if c * in_ * out <= MAX_PRODUCT), default=0))
            x, probe = cancelling(most, in_, out, dtype)
            multiply = make(probe)
            del probe
            counts = proven_row_counts(multiply, x)
            if not counts:
                self.row_stable, counts = False, (BASE_ROWS,)
                logger.warning("%s, %d x %d: rows influence each other; replay is not exact", kind, in_, out)
            logger.info("%s, %d x %d %s: proven at rows %s", kind, in_, out, dtype, list(counts))
            self._counts[key] = counts
        counts = self._counts[key]
        if counts not in self._splitters:
            self._splitters[counts] = RowSplitter(counts)
        return self._splitters[counts]


def rows_are_independent(function: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether `function` gives each row of x the same bits alone, in any number of rows and at any place."""
    whole = function(x)
    for count in (1, 2, 3, 5, 8, 13, 32):
        for first in (0, 1, len(x) - count):
            if not torch.equal(function(x[first : first + count]), whole[first : first + count]):
                return False
    return True


def elements_are_independent(function: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether `function` gives each element of x [many] the same bits at any place: vector bodies and tails differ."""
    whole = function(x)
    for count in (*range(1, 36), 100, 1000, 4097, len(x)):
        for first in (0, 1, 3, 8, 13):
            part = x[first : first + count].clone()
            if not torch.equal(function(part), whole[first : first + len(part)]):
                return False
    return True


def proven_tile_rows(head_dim: int, tile_keys: int, row_counts: Sequence[int]) -> tuple[int, ...]:
    """Query rows per tile at which both products of attention give a row the bits that it has among the fewest."""
    matrices = 67
    q, k = cancelling(max(row_counts) * matrices, head_dim, tile_keys)
    p, v = cancelling(max(row_counts) * matrices, tile_keys, head_dim)
    q, p = q.view(matrices, -1, head_dim), p.abs().view(matrices, -1, tile_keys)
    products = ((q, k.T), (p, v.T))
    wholes = [torch.bmm(a[:, : row_counts[0]], b.expand(matrices, -1, -1).contiguous()) for a, b in products]
    proven = []
    for rows in row_counts:
        if all(_agree(a, b.contiguous(), rows, whole) for (a, b), whole in zip(products, wholes, strict=True)):
            proven.append(rows)
    return tuple(proven)


def _agree(a: Tensor, b: Tensor, rows: int, whole: Tensor) -> bool:
    """Whether products of `rows` rows, in batches of many sizes, equal those of the fewest rows at every place."""
    known = whole.shape[1]
    for batch in (1, 2, 3, 5, 8, 16, 33, len(a)):
        for place in range(rows) if batch == 5 else (0, rows - known):
            moved = a[:batch, :rows].roll(place, 1).contiguous()
            product = torch.bmm(moved, b.expand(batch, -1, -1).contiguous())
            if not torch.equal(product.roll(-place, 1)[:, :known], whole[:batch]):
                return False
    return True
