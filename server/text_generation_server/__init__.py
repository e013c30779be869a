"""One tensor-parallel rank of a text generation server."""

__version__ = "0.1.0"
