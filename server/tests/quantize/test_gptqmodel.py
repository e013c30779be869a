"""GPTQModel, and transformers with it, read what was made as the server does.

GPTQModel wants other versions than the server installs, so it lives in an environment of its own, which
benchmark/README.md says how to make: target/gptqmodel, or the interpreter that GPTQMODEL_PYTHON names.
"""

import copy
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from text_generation_server.checkpoint.tensors import Checkpoint
from text_generation_server.planning import plan_model
from text_generation_server.quantize.recording import read_dense
from text_generation_server.quantize.settings import Scheme, Solver

READER = Path(__file__).parent / "gptqmodel_reader.py"
PEER = Path(os.environ.get("GPTQMODEL_PYTHON", Path(__file__).parents[3] / "target" / "gptqmodel" / "bin" / "python"))
IDS = list(range(5, 69))
pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not PEER.exists(),
        reason=f"GPTQModel is not installed: {PEER} is not there; benchmark/README.md says how to make it",
    ),
]

SHUFFLED = Solver(static_groups=False)
IN_ORDER = Solver(act_order=False)
CASES: dict[str, tuple[str, Scheme, Solver]] = {
    **{f"gptq-{bits}": ("llama", Scheme("gptq", bits, 32, sym=True), Solver()) for bits in (2, 3, 4, 8)},
    **{f"gptq-{bits}-zeros": ("qwen2", Scheme("gptq", bits, 32, sym=False), IN_ORDER) for bits in (2, 3, 4, 8)},
    **{f"gptq-{bits}-shuffled": ("qwen3", Scheme("gptq", bits, 32, sym=True), SHUFFLED) for bits in (2, 3, 4, 8)},
    **{f"gptq-{bits}-shuffled-zeros": ("llama", Scheme("gptq", bits, 32, False), SHUFFLED) for bits in (2, 3, 4, 8)},
    "gptq-one-group": ("llama", Scheme("gptq", 4, -1, sym=True), Solver()),
    "gptq-some": ("llama", Scheme("gptq", 4, 32, True, ("o_proj",), (("down_proj", 8), ("layers.1.*", 3))), Solver()),
    "rtn": ("mistral", Scheme("rtn", 4, 64, sym=True), Solver()),
    "awq": ("llama", Scheme("awq", 4, 32, sym=False), Solver()),
    "awq-some": ("qwen2", Scheme("awq", 4, 64, False, ("o_proj", "layers.0.mlp.*")), Solver()),
    "awq-sym": ("mistral", Scheme("awq", 4, 32, sym=True), Solver()),
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of results, each with what the peer made of it beside."""
    folder = tmp_path_factory.mktemp("results")
    for name, (architecture, scheme, solver) in CASES.items():
        model = folder / f"model-{architecture}"
        if not model.exists():
            tiny.make(model, architecture, torch.float16)
        tiny.run(model, folder / name, scheme=scheme, solver=solver)
    (folder / "ids.json").write_text(json.dumps(IDS))
    # It compiles its arithmetic for every shape unless told not to, for minutes, and looks for things on the network.
    settings = {"HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **settings}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [PEER, READER, folder / "ids.json", *(folder / name for name in CASES)],
        env=environment, capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", CASES)
def test_gptqmodel_has_the_same_matrices(name: str, results: Path) -> None:
    """To the last bit, once rounded to the type in which it computes."""
    plan = plan_model(results / name, world_size=1)
    checkpoint, found = Checkpoint(plan.index), load_file(results / name / "gptqmodel.safetensors")
    quantized = {layer for layer, linear in plan.linears.items() if linear.format.name != "not quantized"}
    assert quantized == {layer for layer in found if not layer.startswith("logits.")}
    for layer in sorted(quantized):
        own = read_dense(checkpoint, layer, plan.linears[layer]).half()
        assert torch.equal(own, found[layer]), layer
    checkpoint.close()


@pytest.mark.parametrize("name", CASES)
def test_gptqmodel_and_transformers_have_the_same_logits(name: str, results: Path) -> None:
    """As near to float64 arithmetic with the weights of the server as lower precision with them is.

    GPTQModel computes in float16; for 4 bits transformers takes a product of torch that does in bfloat16.
    """
    model = tiny.dequantized(results / name)
    exact = logits(copy.deepcopy(model).double())
    halves = {dtype: distance(logits(copy.deepcopy(model).to(dtype)), exact) for dtype in (torch.half, torch.bfloat16)}
    found = load_file(results / name / "gptqmodel.safetensors")
    assert distance(found["logits.gptqmodel"], exact) <= 2 * halves[torch.half]
    # Rules for single layers are in gptq's settings for GPTQModel alone.
    if name != "gptq-some":
        assert distance(found["logits.transformers"], exact) <= 2 * halves[torch.bfloat16]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].double()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())
