"""llguidance's matcher through the library's C interface (llguidance.h), which the Python package carries along.

Its Python interface keeps the interpreter's lock, so that rows are followed one after another; and its masks force the
canonical tokens of text that a grammar leaves no choice about, where single ids are judged by their bytes alone. Here
they are so whoever asks.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
from numpy.typing import NDArray

# What the library takes for the first byte of a token that is no text.
SPECIAL = b"\xff"
ERROR_BYTES = 1000
# The interface is that of this version; pyproject.toml allows no other.
VERSION = b"llguidance@1.9."


class _Limits(ctypes.Structure):
    """`LlgParserLimits`."""

    _fields_ = (
        ("max_items_in_row", ctypes.c_size_t),
        ("initial_lexer_fuel", ctypes.c_uint64),
        ("step_lexer_fuel", ctypes.c_uint64),
        ("step_max_items", ctypes.c_size_t),
        ("max_lexer_states", ctypes.c_size_t),
        ("max_grammar_size", ctypes.c_size_t),
        ("precompute_large_lexemes", ctypes.c_bool),
        ("verbose_errors", ctypes.c_bool),
    )


class _ConstraintInit(ctypes.Structure):
    """`LlgConstraintInit`."""

    _fields_ = (
        ("tokenizer", ctypes.c_void_p),
        ("log_buffer_level", ctypes.c_uint32),
        ("log_stderr_level", ctypes.c_uint32),
        ("ff_tokens_ok", ctypes.c_bool),
        ("backtrack_ok", ctypes.c_bool),
        ("limits", _Limits),
    )


class _TokenizerInit(ctypes.Structure):
    """`LlgTokenizerInitV2`."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("vocab_size", ctypes.c_uint32),
        ("tok_eos", ctypes.c_uint32),
        ("token_lens", ctypes.c_void_p),
        ("token_bytes", ctypes.c_void_p),
        ("tokenizer_json", ctypes.c_char_p),
        ("tokenize_assumes_string", ctypes.c_bool),
        ("tokenize_fn", ctypes.c_void_p),
        ("use_approximate_greedy_tokenize_fn", ctypes.c_bool),
        ("tokenize_user_data", ctypes.c_void_p),
        ("slices", ctypes.c_void_p),
        ("tok_eos_extra", ctypes.c_void_p),
        ("tok_eos_extra_count", ctypes.c_uint32),
    )


_INT, _POINTER, _TEXT = ctypes.c_int32, ctypes.c_void_p, ctypes.c_char_p
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llg_get_version": (_TEXT, ()),
    "llg_new_tokenizer_v2": (_POINTER, (_POINTER, _TEXT, ctypes.c_size_t)),
    "llg_free_tokenizer": (None, (_POINTER,)),
    "llg_new_matcher": (_POINTER, (_POINTER, _TEXT, _TEXT)),
    "llg_clone_matcher": (_POINTER, (_POINTER,)),
    "llg_free_matcher": (None, (_POINTER,)),
    "llg_matcher_get_error": (_TEXT, (_POINTER,)),
    "llg_matcher_consume_tokens": (_INT, (_POINTER, _POINTER, ctypes.c_size_t)),
    "llg_matcher_validate_tokens": (_INT, (_POINTER, _POINTER, ctypes.c_size_t)),
    "llg_matcher_compute_mask_into": (_INT, (_POINTER, _POINTER, ctypes.c_size_t)),
}


@functools.cache
def interface() -> Any:
    """The loaded library; OSError if it is none that is known."""
    (path,) = Path(llguidance.__file__).parent.glob("_lib*.so")
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in _FUNCTIONS.items():
        try:
            function = getattr(library, name)
        except AttributeError:
            raise OSError(f"the installed llguidance has no {name}; install {VERSION.decode()[:-1]}") from None
        function.restype, function.argtypes = result, arguments
    if not (found := library.llg_get_version()).startswith(VERSION):
        raise OSError(f"found {found.decode(errors='replace')}, expected {VERSION.decode()}x; install that")
    return library


@functools.cache
def functions() -> tuple[int, int, int]:
    """Addresses of what judges ids, goes on by ids and finds masks, for kernels that call them."""
    library = interface()
    return (
        address_of(library.llg_matcher_validate_tokens),
        address_of(library.llg_matcher_consume_tokens),
        address_of(library.llg_matcher_compute_mask_into),
    )


def address_of(function: Any) -> int:
    return ctypes.cast(function, _POINTER).value or 0


@dataclass(frozen=True)
class Limits:
    """How much a grammar may cost; see the library's `ParserLimits`."""

    max_items_in_row: int
    initial_lexer_fuel: int
    step_lexer_fuel: int
    step_max_items: int
    max_lexer_states: int
    max_grammar_size: int


class Vocabulary:
    """The tokens of a tokenizer, made ready for matchers. Matchers keep it alive."""

    def __init__(self, tokens: llguidance.LLTokenizer, eos_token_ids: Sequence[int]) -> None:
        """Raises ValueError if the library cannot use them."""
        self.size = tokens.vocab_size
        texts = [text_of(tokens, token_id) for token_id in range(self.size)]
        lens = np.array([len(text) for text in texts], np.uint32)
        octets = ctypes.create_string_buffer(b"".join(texts))
        eos = np.array(eos_token_ids, np.uint32)
        init = _TokenizerInit(
            struct_size=ctypes.sizeof(_TokenizerInit),
            vocab_size=self.size,
            tok_eos=int(eos[0]),
            token_lens=lens.ctypes.data,
            token_bytes=ctypes.addressof(octets),
            use_approximate_greedy_tokenize_fn=True,
            tok_eos_extra=eos[1:].ctypes.data,
            tok_eos_extra_count=len(eos) - 1,
        )
        error = ctypes.create_string_buffer(ERROR_BYTES)
        self._address = interface().llg_new_tokenizer_v2(ctypes.byref(init), error, ERROR_BYTES)
        if not self._address:
            raise ValueError(error.value.decode(errors="replace"))

    def matcher(self, grammar: str, limits: Limits) -> Matcher:
        """What follows `grammar`, of `LLMatcher.grammar_from_…`; it may be in error."""
        init = _ConstraintInit(tokenizer=self._address, limits=_Limits(**limits.__dict__))
        return Matcher(interface().llg_new_matcher(ctypes.byref(init), b"llguidance", grammar.encode()), self)

    def __del__(self) -> None:
        if getattr(self, "_address", None):
            interface().llg_free_tokenizer(self._address)


def text_of(tokens: llguidance.LLTokenizer, token_id: int) -> bytes:
    """The bytes of a token as the library's trie has them; none where there is no such token."""
    text = tokens.decode_bytes([token_id])
    if tokens.is_special_token(token_id):
        return SPECIAL + text
    return b"" if text == f"<[{token_id}]>".encode() else text


class Matcher:
    """Follows one text. One thread at a time; the interpreter's lock is not held meanwhile."""

    # Of each row of a step something is looked at when nothing is in a core's caches.
    __slots__ = ("address", "mask_words", "vocabulary")

    def __init__(self, address: int, vocabulary: Vocabulary) -> None:
        """address: of an `LlgMatcher`, which it frees."""
        self.address, self.vocabulary = address, vocabulary
        self.mask_words = -(-vocabulary.size // 32)

    def copy(self) -> Matcher:
        """Another one in the same state, with all that its lexer has learnt."""
        return Matcher(interface().llg_clone_matcher(self.address), self.vocabulary)

    def error(self) -> str | None:
        """What went wrong; after that, nothing goes on."""
        text = interface().llg_matcher_get_error(self.address)
        return None if text is None else text.decode(errors="replace")

    def consume(self, token_ids: Sequence[int]) -> int:
        """Goes on by these ids as far as they are allowed. How many of them: no error comes of one that is not.

        -1 after an error.
        """
        ids = (ctypes.c_uint32 * len(token_ids))(*token_ids)
        allowed = int(interface().llg_matcher_validate_tokens(self.address, ids, len(ids)))
        if allowed > 0 and interface().llg_matcher_consume_tokens(self.address, ids, allowed):
            return -1
        return allowed

    def fill(self, words: NDArray[np.int32]) -> None:
        """Says which ids may come next: a bit for each in words, lowest first. Nothing after an error.

        words: as many as the logits ask for; none of those beyond `mask_words` may come.
        """
        own = words if len(words) == self.mask_words else np.zeros(self.mask_words, np.int32)
        interface().llg_matcher_compute_mask_into(self.address, own.__array_interface__["data"][0], own.nbytes)
        if own is not words:
            shared = min(len(own), len(words))
            words[:shared], words[shared:] = own[:shared], 0

    def __del__(self) -> None:
        if getattr(self, "address", None):
            interface().llg_free_matcher(self.address)
