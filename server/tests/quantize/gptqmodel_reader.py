"""Run by the interpreter of an environment in which GPTQModel is: loads results, and writes what it makes of them.

Arguments: a JSON file with a list of token ids, then folders of results. Into each folder goes `gptqmodel.safetensors`:
`<layer>` the layer's matrix [out, in] in float16, and `logits.<reader>` [tokens, vocabulary] in float32 of the
readers `gptqmodel` and `transformers`. Imports nothing of the server.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from gptqmodel import BACKEND, GPTQModel  # type: ignore[import-not-found]
from safetensors.torch import save_file

DTYPE = torch.float16  # the type in which all of its layers compute on a processor; float32 it refuses


@torch.no_grad()
def matrix(layer: Any) -> torch.Tensor:
    """What the layer multiplies with, by what it does to unit vectors: no sum is rounded."""
    layer.bias = None
    y: torch.Tensor = layer(torch.eye(layer.in_features, dtype=DTYPE))
    return y.T.contiguous()


@torch.no_grad()
def read(folder: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    settings = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    backend = BACKEND.AWQ_TORCH if settings["quant_method"] == "awq" else BACKEND.GPTQ_TORCH
    model = GPTQModel.load(folder, device="cpu", backend=backend, dtype=DTYPE)
    found = {"logits.gptqmodel": model(input_ids=ids).logits[0].float()}
    for name, layer in model.model.named_modules():
        if hasattr(layer, "qweight"):
            found[name] = matrix(layer)
    if settings["quant_method"] == "gptq" and "dynamic" in settings:
        return found  # rules for single layers, of which transformers knows nothing
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=DTYPE)
    return found | {"logits.transformers": model(input_ids=ids).logits[0].float()}


def main() -> None:
    """Each folder, one after another."""
    ids = torch.tensor([json.loads(Path(sys.argv[1]).read_text())])
    for folder in sys.argv[2:]:
        save_file(read(folder, ids), Path(folder) / "gptqmodel.safetensors")


if __name__ == "__main__":
    main()
