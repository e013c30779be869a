"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): columns are rounded in turn, those that follow make up for the error.

The inverse Hessian enters as its upper Cholesky factor, made once for all linears that have the same input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.columns import round_columns
from .rounding import Codes, Grid, group_index, grouped

# Columns after which all that follow are brought up to date, and columns that are rounded in one go.
OUTER, INNER = 128, 32
# Damping is raised so long by this factor, as a Hessian needs it that rounding errors left indefinite.
RAISE, MOST_DAMPING = 4.0, 16.0


class NotPositiveDefiniteError(ValueError):
    """No damping makes a Cholesky factor of this Hessian."""


@dataclass(frozen=True)
class Factor:
    """What GPTQ needs of a Hessian.

    upper: [in, in], U with H⁻¹ = Uᵀ U, of the damped Hessian in the order in which columns are rounded.
    order: int64 [in], the feature that is rounded at each place; None: in their own order.
    dead: bool [in], features that are always zero.
    diagonal: [in], of the Hessian before damping.
    damping: share of the mean diagonal that was added.
    """

    upper: Tensor
    order: Tensor | None
    dead: Tensor
    diagonal: Tensor
    damping: float


def factorize(hessian: Tensor, damping: float, act_order: bool) -> Factor:
    """hessian: [in, in], of x.T @ x, symmetric and finite. act_order: largest diagonal first.

    Raises:
        NotPositiveDefiniteError: not even much damping makes it so.
    """
    diagonal = hessian.diagonal().clone()
    dead = diagonal == 0
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else None
    # H = R Rᵀ with R upper is the Cholesky factorization from the end; then U is the inverse of R.
    # Nothing in memory is larger than these matrices: each is forgotten as soon as the next is there.
    mirrored = (hessian if order is None else hessian[order][:, order]).flip(0, 1)
    ordered = dead if order is None else dead[order]
    mirrored.diagonal()[ordered.flip(0)] = 1
    factor, added = _cholesky(mirrored, damping)
    del mirrored
    inverse = torch.linalg.solve_triangular(
        factor, torch.eye(len(factor), dtype=factor.dtype, device=factor.device), upper=False
    )
    del factor
    return Factor(inverse.flip(0, 1).contiguous(), order, dead, diagonal, added)


def _cholesky(matrix: Tensor, damping: float) -> tuple[Tensor, float]:
    """The lower factor, and the damping that it took. The diagonal of `matrix` is changed."""
    mean, added = float(matrix.diagonal().mean()), 0.0
    while damping <= MOST_DAMPING:
        matrix.diagonal().add_((damping - added) * mean)
        added = damping
        factor, info = torch.linalg.cholesky_ex(matrix)
        if not int(info):
            return factor, added
        damping *= RAISE
    raise NotPositiveDefiniteError(f"not positive definite even with {added:g} of its mean diagonal added")


def solve(weight: Tensor, factor: Factor, grid: Grid, group_size: int, static_groups: bool) -> Codes:
    """Codes of one linear, or of several with the same input one under the other. weight: float [out, in].

    static_groups: groups are of neighbours and their grids those of the weight as it was; else groups are of columns
    that are rounded one after another, and their grids are fitted to what these have become.
    """
    out, num = weight.shape
    size = num if group_size == -1 else group_size
    order = torch.arange(num, device=weight.device) if factor.order is None else factor.order
    transposed = weight.T.clone()
    transposed[factor.dead] = 0
    transposed = transposed[order].contiguous()  # [in, out]
    index = group_index(num, group_size, weight.device)
    if static_groups:
        importance = grouped(factor.diagonal[None], group_size)[0] if grid.search else None
        found = grid.fit(grouped(weight.masked_fill(factor.dead, 0), group_size), importance)
        scales, zeros = (part.T.contiguous() for part in found)  # [groups, out]
        state = _Rounding(transposed, factor.upper, grid, scales, zeros, index[order], size, factor.diagonal[order])
        group_of = index
    else:
        scales = transposed.new_empty(int(index[-1]) + 1, out)
        zeros = torch.empty_like(scales)
        state = _Rounding(transposed, factor.upper, grid, scales, zeros, None, size, factor.diagonal[order])
        group_of = torch.empty_like(index)
        group_of[order] = index
    state.run()
    codes = torch.empty_like(state.codes)
    codes[order] = state.codes
    return Codes(grid.bits, codes.T.contiguous(), scales.T.half().contiguous(), zeros.T.to(torch.uint8), group_of)


class _Rounding:
    """One pass over the columns. Everything is transposed: a column is contiguous, a row belongs to one column."""

    def __init__(
        self, weight: Tensor, upper: Tensor, grid: Grid, scales: Tensor, zeros: Tensor, static: Tensor | None,
        size: int, diagonal: Tensor,
    ):  # fmt: skip
        self.weight, self.upper, self.grid, self.size = weight, upper, grid, size
        self.scales, self.zeros, self.static, self.diagonal = scales, zeros, static, diagonal
        self.codes = torch.empty_like(weight, dtype=torch.uint8)
        self.errors = torch.empty_like(weight[:OUTER])

    def run(self) -> None:
        num = len(self.weight)
        for first in range(0, num, OUTER):
            last = min(first + OUTER, num)
            self._outer(first, last)
            self._spread(first, last, range(last, num), first)

    def _outer(self, first: int, last: int) -> None:
        fresh = first  # errors before this column have reached every column of the run
        step = min(INNER, self.size)
        for begin in range(first, last, step):
            end = min(begin + step, last)
            starts_group = self.static is None and begin % self.size == 0
            if begin > fresh:
                self._spread(fresh, begin, range(begin, last if starts_group else end), first)
                fresh = begin if starts_group else fresh
            if starts_group:
                self._fit(begin)
            self._inner(begin, end, first)

    def _fit(self, begin: int) -> None:
        group = slice(begin, begin + self.size)
        importance = self.diagonal[group] if self.grid.search else None
        scale, zero = self.grid.fit(self.weight[group].T, importance)
        self.scales[begin // self.size], self.zeros[begin // self.size] = scale, zero

    def _inner(self, begin: int, end: int, first: int) -> None:
        columns = slice(begin, end)
        if self.static is None:
            group = begin // self.size
            scale, zero = (x[group].expand(end - begin, -1) for x in (self.scales, self.zeros))
        else:
            scale, zero = (x[self.static[columns]] for x in (self.scales, self.zeros))
        round_columns(
            self.weight[columns], self.upper[columns, columns], scale, zero, self.grid.most, self.codes[columns],
            self.errors[begin - first : end - first],
        )  # fmt: skip

    def _spread(self, begin: int, end: int, targets: range, first: int) -> None:
        """Takes the errors of the columns from `begin` to `end` out of the columns `targets`."""
        if targets:
            at = slice(targets.start, targets.stop)
            self.weight[at].addmm_(self.upper[begin:end, at].T, self.errors[begin - first : end - first], alpha=-1)
