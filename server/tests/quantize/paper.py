"""GPTQ and AWQ in float64, as their papers state them: with the inverse Hessian itself, one weight after another.

Frantar et al. 2022, arXiv:2210.17323, equations 2 and 3; Lin et al. 2023, arXiv:2306.00978, equations 4 and 5.
Nothing here is the server's.
"""

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Ints = NDArray[np.int64]


def stored(scale: Matrix) -> Matrix:
    """As float16 holds it; 1 for a group of zeros."""
    return np.where(scale == 0, 1.0, scale).astype(np.float16).astype(np.float64)


def grid(group: Matrix, bits: int, sym: bool) -> tuple[Matrix, Matrix]:
    """Scale and zero point of each row of a group [out, size], from its largest and smallest weight."""
    most = 2**bits - 1
    low, high = np.minimum(group.min(1), 0), np.maximum(group.max(1), 0)
    if sym:
        return stored(2 * np.maximum(-low, high) / most), np.full(len(group), 2.0 ** (bits - 1))
    scale = stored((high - low) / most)
    zero = np.round(-low / scale)
    # Zero points of 0 are not written: some readers take them for 16.
    scale = np.where(zero < 1, stored(high / (most - 1)), scale)
    return scale, np.clip(zero, 1, most)


def code(weight: Matrix, scale: Matrix, zero: Matrix, bits: int) -> Matrix:
    return np.clip(np.round(weight / scale + zero), 0, 2**bits - 1)


def gptq(
    weight: Matrix, hessian: Matrix, bits: int, size: int, *, sym: bool, damping: float, order: Ints, static: bool
) -> tuple[Ints, Matrix, Matrix, Ints]:
    """Codes [out, in], scales and zero points [out, groups], and the group of each feature."""
    weight, num = weight.copy(), weight.shape[1]
    size = num if size == -1 else size
    hessian = hessian.copy()
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    inverse = np.linalg.inv(hessian + damping * np.diag(hessian).mean() * np.eye(num))
    groups = -(-num // size)
    scales, zeros = np.zeros((len(weight), groups)), np.zeros((len(weight), groups))
    group_of, codes = np.zeros(num, np.int64), np.zeros(weight.shape, np.int64)
    if static:
        for g in range(groups):
            scales[:, g], zeros[:, g] = grid(weight[:, g * size : (g + 1) * size], bits, sym)
    left = list(range(num))  # features that are not rounded yet: the rows of `inverse`
    for place, q in enumerate(order):
        g = q // size if static else place // size
        group_of[q] = g
        if not static and place % size == 0:
            scales[:, g], zeros[:, g] = grid(weight[:, order[place : place + size]], bits, sym)
        codes[:, q] = code(weight[:, q], scales[:, g], zeros[:, g], bits)
        p = left.index(q)
        error = (weight[:, q] - (codes[:, q] - zeros[:, g]) * scales[:, g]) / inverse[p, p]
        weight[:, left] -= error[:, None] * inverse[p]
        inverse = inverse - np.outer(inverse[:, p], inverse[p]) / inverse[p, p]
        inverse = np.delete(np.delete(inverse, p, 0), p, 1)
        left.pop(p)
    return codes, scales, zeros, group_of


def rounded(weight: Matrix, bits: int, size: int, sym: bool) -> Matrix:
    """Each weight to the nearest number of its group's grid."""
    size = weight.shape[1] if size == -1 else size
    result = np.empty_like(weight)
    for first in range(0, weight.shape[1], size):
        group = weight[:, first : first + size]
        scale, zero = (x[:, None] for x in grid(group, bits, sym))
        result[:, first : first + size] = (code(group, scale, zero, bits) - zero) * scale
    return result
