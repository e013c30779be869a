"""AutoAWQ, which defined the gemm layout, reads what `--method awq` makes as the server does.

It is no longer kept and wants versions that the server does not; its source suffices, in a folder of its own, which
benchmark/README.md says how to make: target/autoawq, or the folder that AUTOAWQ names.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from text_generation_server.checkpoint.tensors import Checkpoint
from text_generation_server.planning import plan_model
from text_generation_server.quantize.recording import read_dense
from text_generation_server.quantize.settings import Scheme

READER = Path(__file__).parent / "autoawq_reader.py"
AUTOAWQ = Path(os.environ.get("AUTOAWQ", Path(__file__).parents[3] / "target" / "autoawq"))
pytestmark = pytest.mark.skipif(
    not AUTOAWQ.exists(),
    reason=f"AutoAWQ is not installed: {AUTOAWQ} is not there; benchmark/README.md says how to make it",
)


@pytest.mark.parametrize(
    ("architecture", "scheme"),
    [
        ("llama", Scheme("awq", 4, 32, sym=False)),
        ("qwen2", Scheme("awq", 4, 64, False, ("o_proj", "layers.0.mlp.*"))),
        ("qwen3", Scheme("awq", 4, -1, sym=False)),
        ("mistral", Scheme("awq", 4, 32, sym=True)),
    ],
)
def test_autoawq_s_own_layer_has_the_same_matrices(architecture: str, scheme: Scheme, tmp_path: Path) -> None:
    """To the last bit; names, shapes and dtypes of the tensors are those that its layer declares."""
    model = tiny.make(tmp_path / "model", architecture, torch.float16)
    folder, output = tmp_path / "result", tmp_path / "matrices.safetensors"
    tiny.run(model, folder, scheme=scheme)
    command = [sys.executable, READER, AUTOAWQ, folder, output]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    plan, found = plan_model(folder, world_size=1), load_file(output)
    checkpoint = Checkpoint(plan.index)
    assert set(found) == {layer for layer, linear in plan.linears.items() if linear.format.name != "not quantized"}
    for layer, matrix in found.items():
        assert torch.equal(read_dense(checkpoint, layer, plan.linears[layer]).half(), matrix), layer
    checkpoint.close()
