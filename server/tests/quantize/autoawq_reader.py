"""Run beside AutoAWQ's source: reads a result's layers as its own class for the gemm layout does.

Arguments: the folder that AutoAWQ is installed in, a folder of a result, a file for the matrices: `<layer>` [out, in]
in float16. AutoAWQ is no longer kept, and its package imports what today's transformers no longer has; so only the
class and what it needs are imported. Imports nothing of the server.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
import transformers.utils.hub  # noqa: F401  # before accelerate is taken away
from safetensors.torch import load_file, save_file

source, folder, output = map(Path, sys.argv[1:])
for name in ("awq", "awq.models", "awq.modules", "awq.modules.linear"):
    package = types.ModuleType(name)
    package.__path__ = [str(source / name.replace(".", "/"))]
    sys.modules[name] = package
# Neither is needed to read a layer; with triton it takes products that a GPU alone has.
sys.modules["accelerate"] = types.ModuleType("accelerate")
sys.modules["triton"] = None  # type: ignore[assignment]

from awq.models._config import AwqConfig  # type: ignore[import-not-found]  # noqa: E402
from awq.modules.linear.gemm import WQLinear_GEMM  # type: ignore[import-not-found]  # noqa: E402


@torch.no_grad()
def matrix(config: Any, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the layer multiplies with, by what it does to unit vectors: no sum is rounded."""
    in_features, out_features = len(tensors["qweight"]), tensors["scales"].shape[1]
    layer = WQLinear_GEMM(config.w_bit, config.q_group_size, in_features, out_features, "bias" in tensors, "cpu")
    for name, buffer in layer.named_buffers():
        assert (tensors[name].dtype, tensors[name].shape) == (buffer.dtype, buffer.shape), name
    layer.load_state_dict(tensors)
    layer.bias = None
    y: torch.Tensor = layer(torch.eye(in_features, dtype=torch.float16))
    return y.T.contiguous()


config = AwqConfig.from_pretrained(str(folder))
assert config.version == "gemm"
index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
state: dict[str, torch.Tensor] = {}
for file in sorted(set(index.values())):
    state |= load_file(folder / file)
layers = [name.removesuffix(".qweight") for name in state if name.endswith(".qweight")]
parts = {layer: {n.rpartition(".")[2]: t for n, t in state.items() if n.startswith(f"{layer}.")} for layer in layers}
# Bias is stored in the model's type; the layer has it in its own.
parts = {layer: {n: t.half() if n == "bias" else t for n, t in found.items()} for layer, found in parts.items()}
save_file({layer: matrix(config, found) for layer, found in parts.items()}, output)
