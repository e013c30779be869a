"""The emulation of AVX-512 gives the bits of the processor's own instructions, where it has them."""

import pytest
import torch
from emulated_avx512 import WANTED
from test_quantized_products import CODINGS, make
from text_generation_server.errors import ConfigError
from text_generation_server.kernels.cpu.native import build, library
from text_generation_server.kernels.cpu.native.library import Library
from text_generation_server.kernels.cpu.native.linear import dense_linear, quantized_linear
from text_generation_server.kernels.weights import Coding, Integer

if not WANTED:
    pytest.skip("EMULATE_AVX512=1 is not set", allow_module_level=True)


def both_of(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Library, Library]:
    emulated = Library(name)
    monkeypatch.setattr(library, "LIBRARY", build.LIBRARY)
    try:
        return emulated, Library(name)
    except (ConfigError, OSError) as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", ["avx512", "avx512_vnni", "avx512_bf16"])
@pytest.mark.parametrize("coding", [*CODINGS, torch.bfloat16], ids=str)
def test_products_have_the_same_bits(coding: Coding | torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = both_of(name, monkeypatch)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(40, 520, generator=torch.Generator().manual_seed(1)).to(dtype)
        x[::3, ::7] *= 40
        found = []
        for each in libraries:
            if isinstance(coding, torch.dtype):
                matmul = dense_linear(each, x)
            else:
                weight, _ = make(coding, 70, 520, 104, isinstance(coding, Integer), False, torch.float16)
                matmul = quantized_linear(each, weight, dtype)
            found.append([matmul(x[:count]) for count in (1, 2, 7, 40)])
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
