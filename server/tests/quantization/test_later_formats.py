"""Formats that are not served yet can be declared already: their tensors' shapes, and which part of each a rank reads.

Each declaration is only a `TensorSpec` of its tensors; shapes are those of the formats' public files or descriptions.
"""

from dataclasses import dataclass

import pytest
from text_generation_server.quantization.spec import Along, Axis, Cut, Shape, TensorSpec

IN, OUT, NEITHER = Along.IN, Along.OUT, Along.NEITHER
F16, I16, I32, I8 = ("F16",), ("I16",), ("I32",), ("I8",)


def one(along: Along, features: int = 1, elements: int = 1) -> Axis:
    return Axis(along, features, elements)


def some(elements: int) -> Axis:
    return Axis(NEITHER, elements=elements)


@dataclass(frozen=True)
class Declared:
    """A format of a linear of some shape: its tensors, their shapes, and the elements that a cut needs of them."""

    name: str
    shape: Shape
    specs: tuple[TensorSpec, ...]
    stored: dict[str, tuple[int, ...]]
    # Of OUT features 256 to 512 and IN features 1024 to 2048: the range in each dimension.
    read: dict[str, tuple[range, ...]]


FORMATS = [
    # 1 codebook of 2 ** 16 vectors of 8 weights: a code for every 8 features of IN; codebooks and scales beside.
    Declared(
        "AQLM 1x16", Shape(4096, 4096),
        (
            TensorSpec("codes", (one(OUT), one(IN, 8), some(1)), I16),
            TensorSpec("codebooks", (some(1), some(65536), some(1), some(8)), F16),
            TensorSpec("scales", (one(OUT), some(1), some(1), some(1)), F16),
        ),
        {"codes": (4096, 512, 1), "codebooks": (1, 65536, 1, 8), "scales": (4096, 1, 1, 1)},
        {
            "codes": (range(256, 512), range(128, 256), range(1)),
            "codebooks": (range(1), range(65536), range(1), range(8)),
            "scales": (range(256, 512), range(1), range(1), range(1)),
        },
    ),
    # Four rows are interleaved in blocks of 64 columns: [out / 4, in] int16; scales as in gemv, but transposed.
    Declared(
        "AWQ gemv_fast", Shape(4096, 4096),
        (
            TensorSpec("qweight", (one(OUT, 4), one(IN, 64, 64)), I16),
            TensorSpec("scales", (some(32), one(OUT)), F16),
            TensorSpec("scaled_zeros", (some(32), one(OUT)), F16),
        ),
        {"qweight": (1024, 4096), "scales": (32, 4096), "scaled_zeros": (32, 4096)},
        {"qweight": (range(64, 128), range(1024, 2048)), "scales": (range(32), range(256, 512)),
         "scaled_zeros": (range(32), range(256, 512))},
    ),
    # MIT's own files: the same words, the scales filled up to whole words of groups (24 groups of 128 -> 24).
    Declared(
        "llm-awq", Shape(1024, 3072),
        (
            TensorSpec("qweight", (one(OUT, 4), one(IN, 64, 64)), I16),
            TensorSpec("scales", (one(IN, 1024, 8), one(OUT)), F16),
            TensorSpec("scaled_zeros", (one(IN, 1024, 8), one(OUT)), F16),
        ),
        {"qweight": (256, 3072), "scales": (24, 1024), "scaled_zeros": (24, 1024)},
        {"qweight": (range(64, 128), range(1024, 2048)), "scales": (range(8, 16), range(256, 512)),
         "scaled_zeros": (range(8, 16), range(256, 512))},
    ),
    # int8 [in, out], one scale for each row of the weight.
    Declared(
        "EETQ", Shape(4096, 2048),
        (TensorSpec("weight", (one(IN), one(OUT)), I8), TensorSpec("weight_scales", (one(OUT),), F16)),
        {"weight": (2048, 4096), "weight_scales": (4096,)},
        {"weight": (range(1024, 2048), range(256, 512)), "weight_scales": (range(256, 512),)},
    ),
    # Tiles of 16 x 16, eight 4-bit codes in a word, one line of tiles of 64 OUT features and more in a permuted order.
    Declared(
        "Marlin", Shape(4096, 4096),
        (
            TensorSpec("B", (one(IN, 16), one(OUT, 64, 128)), I32),
            TensorSpec("s", (one(IN, 128), one(OUT, 64, 64)), F16),
        ),
        {"B": (256, 8192), "s": (32, 4096)},
        {"B": (range(64, 128), range(512, 1024)), "s": (range(8, 16), range(256, 512))},
    ),
    # Rows of words whose bits differ from group to group; which rows belong to a group is data, so all are read.
    # Here: 4096 features in their own order, 32 groups of which half have 4 bits and half 5, 8 and 10 words a column.
    Declared(
        "EXL2", Shape(4096, 4096),
        (
            TensorSpec("q_weight", (some(16 * 16 + 16 * 20), one(OUT)), I32),
            TensorSpec("q_invperm", (one(IN),), I16),
            TensorSpec("q_scale", (some(32), one(OUT, 8)), I32),
            TensorSpec("q_scale_max", (some(32),), F16),
            TensorSpec("q_groups", (some(64),), I16),
        ),
        {"q_weight": (576, 4096), "q_invperm": (4096,), "q_scale": (32, 512), "q_scale_max": (32,), "q_groups": (64,)},
        {"q_weight": (range(576), range(256, 512)), "q_invperm": (range(1024, 2048),),
         "q_scale": (range(32), range(32, 64)), "q_scale_max": (range(32),), "q_groups": (range(64),)},
    ),
    # A matrix that is stored transposed.
    Declared(
        "GPT-2 Conv1D", Shape(2304, 2048),
        (TensorSpec("weight", (one(IN), one(OUT)), F16),),
        {"weight": (2048, 2304)},
        {"weight": (range(1024, 2048), range(256, 512))},
    ),
    # All experts of a layer in one tensor, of which every rank cuts each.
    Declared(
        "experts in one tensor", Shape(1024, 2048),
        (TensorSpec("gate_up_proj", (some(8), one(IN), one(OUT)), F16),),
        {"gate_up_proj": (8, 2048, 1024)},
        {"gate_up_proj": (range(8), range(1024, 2048), range(256, 512))},
    ),
    # The same with gptq's words.
    Declared(
        "experts of gptq in one tensor", Shape(1024, 2048),
        (
            TensorSpec("qweight", (some(8), one(IN, 8), one(OUT)), I32),
            TensorSpec("qzeros", (some(8), some(16), one(OUT, 8)), I32),
            TensorSpec("scales", (some(8), some(16), one(OUT)), F16),
            TensorSpec("g_idx", (some(8), one(IN)), I32),
        ),
        {"qweight": (8, 256, 1024), "qzeros": (8, 16, 128), "scales": (8, 16, 1024), "g_idx": (8, 2048)},
        {"qweight": (range(8), range(128, 256), range(256, 512)), "qzeros": (range(8), range(16), range(32, 64)),
         "scales": (range(8), range(16), range(256, 512)), "g_idx": (range(8), range(1024, 2048))},
    ),
]  # fmt: skip


@pytest.mark.parametrize("declared", FORMATS, ids=lambda declared: declared.name)
def test_the_tensors_of_a_later_format_can_be_declared(declared: Declared) -> None:
    assert {spec.suffix: spec.shape(declared.shape) for spec in declared.specs} == declared.stored


@pytest.mark.parametrize("declared", FORMATS, ids=lambda declared: declared.name)
def test_what_a_rank_needs_of_a_later_format_follows_from_its_declaration(declared: Declared) -> None:
    cut = Cut(declared.shape, range(256, 512), range(1024, 2048))

    def needed(axis: Axis) -> range:
        return range(axis.elements) if axis.along is NEITHER else axis.cover(cut.along(axis.along), cut.shape)[0]

    assert {spec.suffix: tuple(needed(axis) for axis in spec.axes) for spec in declared.specs} == declared.read
