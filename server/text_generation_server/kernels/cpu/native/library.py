"""The built library: which variants it has, and which one is used."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ....errors import ConfigError
from .build import digest_of_sources

logger = logging.getLogger(__name__)

LIBRARY = Path(__file__).with_name("libkernels.so")
# Of layer.h and linear.h.
FLOATS = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
# Used where it is asked for alone: no processor has run it yet.
ON_DEMAND = ("amx",)
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int32, "l": ctypes.c_int64, "f": ctypes.c_float}


class Library:
    """The built library and the variant of it that is used.

    Raises:
        ConfigError: the processor does not execute the wanted instruction set, or the library has none of that name.
        OSError: it was not built, not from these sources, or not for this system.
    """

    def __init__(self, wanted: str | None = None):
        self._library = ctypes.CDLL(str(LIBRARY))
        # Calls of another version would end the process.
        self._library.kernels_sources.restype = ctypes.c_char_p
        if self._library.kernels_sources().decode() != digest_of_sources():
            raise OSError(f"{LIBRARY.name} was built from other sources than those beside it")
        self._library.kernels_variant.restype = ctypes.c_char_p
        self._library.kernels_step_bytes.restype = ctypes.c_int64
        self.variants = self._list()
        usable = [name for name, runs in self.variants.items() if runs]
        if wanted is not None and wanted not in usable:
            raise ConfigError(
                f"--instruction-set {wanted}: this processor executes {', '.join(usable) or 'none'} of "
                f"{', '.join(self.variants)}"
            )
        if not usable:
            raise OSError(f"this processor executes none of {', '.join(self.variants)}")
        self.name = wanted or next(name for name in reversed(usable) if name not in ON_DEMAND)
        self.variant = list(self.variants).index(self.name)
        # What was found out about kinds of numbers on this processor; see `linear.why_not`.
        self.against: dict[object, str | None] = {}

    def _list(self) -> dict[str, bool]:
        """Names of all variants, the best last, and whether this processor executes them."""
        found: dict[str, bool] = {}
        runs = ctypes.c_int32()
        while (name := self._library.kernels_variant(len(found), ctypes.byref(runs))) is not None:
            found[name.decode()] = bool(runs.value)
        return found

    def function(self, name: str, arguments: str, result: type | None = None) -> Callable[..., Any]:
        """`kernels_<name>`. arguments: a letter for each: p(ointer), i(nt32), l (int64), f(loat)."""
        function = getattr(self._library, f"kernels_{name}")
        function.argtypes = [_TYPES[letter] for letter in arguments]
        function.restype = result
        return function  # type: ignore[no-any-return]

    @property
    def table_coding(self) -> int:
        """How the variant wants codes of a table laid out."""
        return int(self._library.kernels_table_coding(self.variant))

    @property
    def dots_of_codes(self) -> bool:
        """Whether bfloat16 activations become 8-bit integers for products with codes (see few_rows_variant.h)."""
        return bool(self._library.kernels_dots_of_codes(self.variant))

    @property
    def dots_of_numbers(self) -> bool:
        """Whether bfloat16 goes through dot instructions or tiles as it is."""
        return bool(self._library.kernels_dots_of_numbers(self.variant))

    def step_bytes(self, coding: int) -> int:
        return int(self._library.kernels_step_bytes(coding))


def load_library(instruction_set: str | None = None) -> Library | None:
    """The library, if it is built and this processor executes a part of it; says which.

    instruction_set: one of its variants, `none` for no library at all; None: the best.

    Raises:
        ConfigError: the processor does not execute the wanted one.
    """
    if instruction_set == "none":
        logger.info("native kernels: not used, as --instruction-set says; torch's operators serve")
        return None
    try:
        library = Library(instruction_set)
    except OSError as error:
        logger.warning(
            "native kernels: not used, torch's operators serve, several times slower: %s (`make install` builds them, "
            "with a C++ compiler)",
            error,
        )
        return None
    logger.info("native kernels: %s", library.name)
    return library
