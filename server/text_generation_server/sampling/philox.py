"""Counter-based random numbers: a draw depends on its counter and key alone, so nothing has to be remembered.

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


class Purpose(IntEnum):
    """What a draw is for; draws for different purposes are independent."""

    SAMPLE = 0


def philox4x32(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Ten rounds. counter: [n, 4] uint32; key: [n, 2] uint32. Returns [n, 4] uint32."""
    c0, c1, c2, c3 = (counter[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = (key[:, i].astype(np.uint64) for i in range(2))
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1 & _LOW, (p0 >> _32) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def uniform(
    seeds: NDArray[np.uint64], branches: NDArray[np.uint32], positions: NDArray[np.int64], purpose: Purpose
) -> NDArray[np.float64]:
    """One number in [0, 1) of 53 bits for each row. All arguments are [n]; `positions` are those of the new ids."""
    place = positions.astype(np.uint64)
    counter = np.stack(
        [
            (place & _LOW).astype(np.uint32),
            (place >> _32).astype(np.uint32),
            branches.astype(np.uint32),
            np.full(len(place), purpose, np.uint32),
        ],
        axis=1,
    )
    key = np.stack([(seeds & _LOW).astype(np.uint32), (seeds >> _32).astype(np.uint32)], axis=1)
    words = philox4x32(counter, key).astype(np.uint64)
    bits = ((words[:, 0] << _32) | words[:, 1]) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53
