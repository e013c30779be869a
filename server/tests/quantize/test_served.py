"""The shipped model, quantized: what the server computes of the result is what the run printed."""

import math
from pathlib import Path

import pytest
import tiny
import torch
from harness import Log, Shard, load, run_ranks
from text_generation_server.kernels.cpu.kernels import CpuKernels
from text_generation_server.loading import TensorParallel
from text_generation_server.quantize.documents import open_documents
from text_generation_server.quantize.settings import Sampling
from text_generation_server.quantize.windows import make_windows

SAMPLING = Sampling(num_samples=8, length=128)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    for method in ("gptq", "awq"):
        scheme = tiny.Scheme(method, 4, 128, sym=method == "gptq")
        tiny.run(tiny.LLAMA, folder / method, scheme=scheme, sampling=SAMPLING)
    return folder


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_the_server_s_perplexity_is_the_printed_one(method: str, size: int, results: Path, kernels: CpuKernels) -> None:
    windows = make_windows(open_documents(None, tiny.LLAMA), tiny.LLAMA, SAMPLING, 2048, 4096).held_back

    def work(tp: TensorParallel) -> float:
        shard, total = Shard(load(results / method, tp, kernels), num_blocks=8), 0.0
        for ids in windows:
            log = Log(ids, list(range(8)))
            shard.step([(log, len(ids))], sample_all=True)
            if tp.rank == 0:
                rows = torch.stack([log.logits[length] for length in range(1, len(ids))]).double()
                total -= float(rows.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).sum())
        return math.exp(total / sum(len(ids) - 1 for ids in windows))

    proof = tiny.report(results / method, "proof")[0]
    assert run_ranks(size, work)[0] == pytest.approx(proof["perplexity_after"], rel=1e-4)
    # On so little text rounding may also make it a little less.
    assert 0.9 * proof["perplexity_before"] < proof["perplexity_after"] < 1.1 * proof["perplexity_before"]


def test_calibration_makes_gptq_clearly_better_than_rounding(results: Path, tmp_path: Path) -> None:
    rtn = tiny.Scheme("rtn", 4, 128, True)
    tiny.run(tiny.LLAMA, tmp_path / "rtn", scheme=rtn, solver=tiny.Solver(mse=False), sampling=SAMPLING)
    proofs = [tiny.report(folder, "proof")[0] for folder in (results / "gptq", tmp_path / "rtn")]
    assert proofs[0]["kl_mean"] < 0.6 * proofs[1]["kl_mean"]
