"""Damaged, incomplete and hostile checkpoints are refused by name, before anything is read."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from text_generation_server.checkpoint.index import read_header, read_index
from text_generation_server.checkpoint.tensors import Checkpoint
from text_generation_server.errors import CheckpointError


def write(path: Path, header: Any, data: bytes = b"\0" * 16) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | changes


def test_headers_agree_with_what_the_library_wrote(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.ones(7, dtype=torch.bfloat16), "c": torch.tensor(3)}
    tensors |= {"d": torch.empty(0, 4), "e": torch.empty(4, 0)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    header = read_header(tmp_path / "model.safetensors")
    assert {n: (i.shape, i.dtype) for n, i in header.items()} == {
        "a": ((3, 5), "F32"), "b": ((7,), "BF16"), "c": ((), "I64"), "d": ((0, 4), "F32"), "e": ((4, 0), "F32"),
    }  # fmt: skip
    checkpoint = Checkpoint(read_index(tmp_path))
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint[name].read(), tensor)


HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "not json": (b"{nope", b"", "is not JSON"),
    "not utf-8": (b"\xff\xfe\xff\xfe", b"", "is not JSON"),
    "nested too deeply": (b"[" * 100_000, b"", "is not JSON"),
    "a list": ([1, 2], b"", "expected a JSON object"),
    "an entry that is a number": ({"w": 3}, b"", '"w" is described by 3'),
    "an unknown dtype": ({"w": entry(dtype="F3")}, b"\0" * 16, 'dtype "F3"'),
    "a missing shape": ({"w": entry(shape=None)}, b"\0" * 16, "shape null"),
    "a negative size": ({"w": entry(shape=[-2, -2])}, b"\0" * 16, "shape"),
    "a size that is a boolean": ({"w": entry(shape=[True, 4])}, b"\0" * 16, "shape"),
    "three offsets": ({"w": entry(data_offsets=[0, 8, 16])}, b"\0" * 16, "data_offsets"),
    "offsets the wrong way round": ({"w": entry(data_offsets=[16, 0])}, b"\0" * 16, "-16 bytes"),
    "too few bytes for the shape": ({"w": entry(data_offsets=[0, 12])}, b"\0" * 12, "12 bytes; expected 16"),
    "a shape that overflows": ({"w": entry(shape=[2**62, 2**62])}, b"\0" * 16, "16 bytes; expected"),
    "a hole": ({"v": entry(), "w": entry(data_offsets=[20, 36])}, b"\0" * 36, "w begins at byte 20"),
    "an overlap": ({"v": entry(), "w": entry(data_offsets=[8, 24])}, b"\0" * 24, "w begins at byte 8"),
    "the last byte missing": ({"w": entry()}, b"\0" * 15, "15 bytes of data"),
    "one byte extra": ({"w": entry()}, b"\0" * 17, "17 bytes of data"),
    "one name twice": (b'{"w":{},"w":{}}', b"", '"w" occurs twice'),
    "one of many names twice": (
        b"{" + b",".join(b'"w%d":{}' % i for i in [*range(200_000), 199_999]) + b"}",
        b"",
        '"w199999" occurs twice',
    ),
    "a number of many digits": (b'{"w":' + b"9" * 5000 + b"}", b"", "is not JSON"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_damaged_file_is_refused_naming_it(case: str, tmp_path: Path) -> None:
    header, data, message = HEADERS[case]
    write(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError) as error:
        read_index(tmp_path)
    assert message in str(error.value)
    assert "model.safetensors" in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("content", [b"", b"\1\2\3", struct.pack("<Q", 0), struct.pack("<Q", 2**63) + b"{}",
                                     struct.pack("<Q", 100_000_001) + b"{}", struct.pack("<Q", 3) + b"{}"])  # fmt: skip
def test_an_impossible_header_length_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*header length"):
        read_index(tmp_path)


def sharded(folder: Path, weight_map: Any) -> None:
    write(folder / "a.safetensors", {"v": entry()})
    write(folder / "b.safetensors", {"w": entry()})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_joins_its_files(tmp_path: Path) -> None:
    sharded(tmp_path, {"v": "a.safetensors", "w": "b.safetensors"})
    assert {name: info.path.name for name, info in read_index(tmp_path).items()} == {
        "v": "a.safetensors", "w": "b.safetensors",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"v": "a.safetensors", "x": "c.safetensors"}, r"c\.safetensors: no such file.*tensor x"),
        ({"v": "../a.safetensors"}, r"tensor v is in .*expected the name"),
        ({"v": "/etc/passwd"}, r"tensor v is in .*expected the name"),
        ({"v": "sub/a.safetensors"}, r"tensor v is in .*expected the name"),
        ({"v": 3}, r"tensor v is in 3"),
        ({"v": "pytorch_model.bin"}, r"tensor v is in .*expected the name"),
        ({"v": "a.safetensors", "w": "a.safetensors"}, r"a\.safetensors: tensor w is missing"),
        ({}, "weight_map"),
        ([], "weight_map"),
        (None, "weight_map"),
    ],
)
def test_an_index_that_lies_is_refused(weight_map: Any, message: str, tmp_path: Path) -> None:
    sharded(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=message):
        read_index(tmp_path)


def test_two_sets_of_weights_are_refused(tmp_path: Path) -> None:
    sharded(tmp_path, {"v": "a.safetensors", "w": "b.safetensors"})
    write(tmp_path / "model.safetensors", {"v": entry()})
    with pytest.raises(CheckpointError, match=r"model\.safetensors is there, .* one set of weights"):
        read_index(tmp_path)


def test_the_same_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path, {"v": "a.safetensors", "w": "b.safetensors"})
    write(tmp_path / "b.safetensors", {"v": entry(), "w": entry(data_offsets=[16, 32])}, b"\0" * 32)
    with pytest.raises(CheckpointError, match=r"b\.safetensors: tensor v is also in a\.safetensors"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "no weights"),
        (lambda folder: (folder / "pytorch_model.bin").touch(), "is a pickle, which is never loaded"),
        (lambda folder: folder.rmdir(), "no such folder"),
    ],
)
def test_a_folder_without_weights_is_refused(prepare: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    prepare(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        read_index(tmp_path)


def test_only_the_bytes_of_a_slice_are_read(tmp_path: Path) -> None:
    stored = torch.arange(48, dtype=torch.float16).view(6, 8)
    save_file({"w": stored}, tmp_path / "model.safetensors")
    seen: list[int] = []
    checkpoint = Checkpoint(read_index(tmp_path), seen.append)
    part = checkpoint["w"].read({0: range(2, 4), 1: range(4, 8)})
    assert torch.equal(part, stored[2:4, 4:8])
    assert part.is_contiguous()
    assert seen == [16]
    assert checkpoint.bytes_read == 16


def test_a_tensor_that_nobody_stored_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        Checkpoint({})["model.norm.weight"]
