"""Which tensors a model folder holds, and where: safetensors headers, read without torch.

The format (https://github.com/huggingface/safetensors): eight bytes little-endian length of the header, the header as
JSON (name -> dtype, shape, data_offsets), then the data, which the offsets cover without holes or overlaps.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from ..errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor, as its file's header describes it."""

    name: str
    path: Path
    dtype: str  # a key of DTYPE_BYTES
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def read_index(model_dir: Path) -> dict[str, TensorInfo]:
    """Every tensor of the folder by name: of the files an index names, else of `model.safetensors`, else of all files.

    Raises:
        CheckpointError: a file is missing, damaged, outside the folder, or holds a tensor that another file holds too.
    """
    if not model_dir.is_dir():
        raise CheckpointError(f"{model_dir}: expected a folder with config.json and *.safetensors; no such folder")
    index = model_dir / INDEX_NAME
    weight_map = _read_weight_map(index) if index.is_file() else None
    if weight_map and (model_dir / SINGLE_NAME).is_file() and SINGLE_NAME not in weight_map.values():
        raise CheckpointError(
            f"{model_dir}: {SINGLE_NAME} is there, and {INDEX_NAME}, which names other files; expected one set of "
            "weights; remove what is not meant"
        )
    paths = sorted({model_dir / name for name in weight_map.values()}) if weight_map else _find_files(model_dir)
    tensors: dict[str, TensorInfo] = {}
    for path in paths:
        for name, info in read_header(path).items():
            if name in tensors:
                raise CheckpointError(f"{path}: tensor {name} is also in {tensors[name].path.name}; remove one of them")
            tensors[name] = info
    for name, file_name in (weight_map or {}).items():
        if name not in tensors or tensors[name].path.name != file_name:
            raise CheckpointError(f"{model_dir / file_name}: tensor {name} is missing; {INDEX_NAME} says it is here")
    return tensors


def _find_files(model_dir: Path) -> list[Path]:
    if (model_dir / SINGLE_NAME).is_file():
        return [model_dir / SINGLE_NAME]
    found = sorted(model_dir.glob("*.safetensors"))
    if not found:
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in model_dir.glob(pattern))
        hint = f" ({pickles[0]} is a pickle, which is never loaded; convert it)" if pickles else ""
        raise CheckpointError(f"{model_dir}: no weights; expected {SINGLE_NAME} or {INDEX_NAME}{hint}")
    return found


def _read_weight_map(index: Path) -> dict[str, str]:
    value = read_json(index)
    weight_map = value.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is {_short(weight_map)}; expected an object, tensor to file name")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors") or "\\" in name:
            raise CheckpointError(
                f"{index}: tensor {tensor} is in {_short(name)}; expected the name of a *.safetensors file beside it"
            )
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent / name}: no such file, but {INDEX_NAME} puts tensor {tensor} there")
    return weight_map


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file. Reads the header only.

    Raises:
        CheckpointError: the file cannot be read, or it is not exactly what its header says.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            head = file.read(8)
            _refuse_pointer(path, head, size)
            length = int.from_bytes(head, "little")
            if size < 8 or length < 2 or length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{path}: {size} bytes with a header length of {length if size >= 8 else 'nothing'}; expected a "
                    f"safetensors file with a header of 2 to {MAX_HEADER_BYTES} bytes inside it; fetch it again"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    header = _parse_json(path, text)
    header.pop("__metadata__", None)
    spans: list[tuple[int, int, str]] = []
    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        tensors[name], begin, end = _parse_entry(path, name, entry, 8 + length)
        spans.append((begin, end, name))
    _check_coverage(path, sorted(spans), size - 8 - length)
    return tensors


def _parse_entry(path: Path, name: str, entry: Any, data_begins: int) -> tuple[TensorInfo, int, int]:
    where = f"{path}: tensor {_short(name)}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where} is described by {_short(entry)}; expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{where} has dtype {_short(dtype)}; expected one of {', '.join(DTYPE_BYTES)}")
    if not _are_sizes(shape):
        raise CheckpointError(f"{where} has shape {_short(shape)}; expected a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where} has data_offsets {_short(offsets)}; expected [begin, end]")
    info = TensorInfo(name, path, dtype, tuple(shape), data_begins + offsets[0])
    if offsets[1] - offsets[0] != info.num_bytes:
        raise CheckpointError(
            f"{where} has {offsets[1] - offsets[0]} bytes; expected {info.num_bytes} for {dtype} of shape {shape}"
        )
    return info, offsets[0], offsets[1]


def _check_coverage(path: Path, spans: list[tuple[int, int, str]], data_bytes: int) -> None:
    position = 0
    for begin, end, name in spans:
        if begin != position:
            raise CheckpointError(f"{path}: tensor {name} begins at byte {begin} of the data; expected {position}")
        position = end
    if position != data_bytes:
        raise CheckpointError(f"{path}: {data_bytes} bytes of data, its header describes {position}; fetch it again")


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file whose top level is an object.

    Raises:
        CheckpointError: the file is missing, unreadable or something else.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; expected it in the model folder") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    _refuse_pointer(path, text, len(text))
    return _parse_json(path, text)


def _refuse_pointer(path: Path, beginning: bytes, size: int) -> None:
    """Says so if Git LFS left something else in place of the file. size: bytes of all that is there."""
    # No file of JSON or safetensors can begin so.
    if beginning.startswith(b"version "):
        raise CheckpointError(
            f"{path}: is a pointer of Git LFS ({size} bytes), not the file itself; fetch it with git lfs pull"
        )


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise CheckpointError(f"{path}: {_short(twice)} occurs twice in one JSON object; expected it once")
        return value

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:  # a number of very many digits is a ValueError of no other kind
        raise CheckpointError(f"{path}: is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is {_short(value)}; expected a JSON object")
    return value


def _short(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, (str, int, float, list, Mapping)) or value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
