"""Every architecture against transformers on tiny random models: ragged batch, chunked prefill, decode, shards."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from harness import LLAMA, QWEN2, Log, Shard, load, run_ranks
from text_generation_server.checkpoint.model_config import FAMILIES
from text_generation_server.checkpoint.tensors import Checkpoint
from text_generation_server.kernels.cpu.kernels import CpuKernels
from text_generation_server.kernels.interface import Kernels
from text_generation_server.kernels.reference.kernels import ReferenceKernels
from text_generation_server.loading import Alone, Loader, TensorParallel
from text_generation_server.models import registry
from text_generation_server.planning import plan_model

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 131, "max_position_embeddings": 256,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
CONFIGS = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES)),
    "llama-bias-tied": (
        hf.LlamaForCausalLM,
        hf.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    ),
    "llama-llama3": (hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES, head_dim=32, rope_parameters=LLAMA3)),
    "llama-linear": (
        hf.LlamaForCausalLM,
        hf.LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}),
    ),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig(**SIZES, sliding_window=5)),
    "mistral-full": (hf.MistralForCausalLM, hf.MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config(**SIZES)),
    "qwen2-window": (
        hf.Qwen2ForCausalLM,
        hf.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=70, max_window_layers=1),
    ),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config(**SIZES, head_dim=32)),
    "qwen3-window": (
        hf.Qwen3ForCausalLM,
        hf.Qwen3Config(**SIZES, head_dim=16, use_sliding_window=True, sliding_window=6, layer_types=WINDOWS),
    ),
}


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A random model whose every parameter matters, in `folder` as transformers writes it."""
    torch.manual_seed(0)
    cls, config = CONFIGS[name]
    config._attn_implementation = "eager"
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.to(dtype).save_pretrained(folder, max_shard_size="100KB")
    return model


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 131, (n,), generator=generator).tolist() for n in (3, 9, 17, 90)]


def generate(path: Path, tp: TensorParallel, kernels: Kernels, chunk: int, steps: int = 3) -> list[Log]:
    """Prefills all prompts in chunks, mixed with decoding; every log keeps the logits of its sampled rows."""
    shard = Shard(load(path, tp, kernels), block_size=8)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(2)).tolist()
    logs = [Log(ids, order[i * 16 : (i + 1) * 16]) for i, ids in enumerate(prompts())]
    ends = [len(log.ids) + steps for log in logs]
    while work := [(log, min(chunk, len(log.ids) - log.computed)) for log in logs if log.computed < len(log.ids)]:
        shard.step(work)
        for log, end in zip(logs, ends, strict=True):
            if log.computed == len(log.ids) < end:
                # The next id is fixed beforehand, so that ranks need not tell each other.
                log.ids.append((log.ids[-1] * 7 + 3) % 131)
    return logs


def check(logs: list[Log], model: Any) -> None:
    for log in logs:
        with torch.no_grad():
            want = model(torch.tensor([log.ids])).logits[0]
        assert len(log.logits) == 4
        for length, row in log.logits.items():
            torch.testing.assert_close(row, want[length - 1], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name: str, size: int, kernels: CpuKernels, tmp_path: Path) -> None:
    # Four shards of two key/value heads share them; 131 ids do not divide over two or four.
    model = save(name, tmp_path)
    results = run_ranks(size, lambda tp: generate(tmp_path, tp, kernels, chunk=7))
    check(results[0], model)  # type: ignore[arg-type]
    assert all(not log.logits for logs in results[1:] for log in logs)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("num_kv_heads", "name"), [(2, "llama"), (4, "llama"), (6, "llama"), (4, "qwen3")])
def test_three_shards_whose_query_heads_share_key_heads_unevenly(
    num_kv_heads: int, name: str, kernels: CpuKernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls, _ = CONFIGS[name]
    sizes = SIZES | {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": num_kv_heads}
    monkeypatch.setitem(CONFIGS, name, (cls, cls.config_class(**sizes, head_dim=8)))
    model = save(name, tmp_path)
    results = run_ranks(3, lambda tp: generate(tmp_path, tp, kernels, chunk=7))
    check(results[0], model)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3-window"])
def test_logits_of_the_reference_kernels_equal_transformers(name: str, tmp_path: Path) -> None:
    model = save(name, tmp_path)
    check(generate(tmp_path, TensorParallel(0, 1, Alone()), ReferenceKernels(), 7), model)


def test_a_vocabulary_smaller_than_its_shares_leaves_a_rank_with_none(tmp_path: Path, kernels: CpuKernels) -> None:
    torch.manual_seed(0)
    config = hf.LlamaConfig(**(SIZES | {"vocab_size": 5}), tie_word_embeddings=True, pad_token_id=0, eos_token_id=1)
    model: Any = hf.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    ids = [0, 1, 2, 3, 4, 4, 0]

    def work(tp: TensorParallel) -> dict[int, torch.Tensor]:
        log = Log(list(ids), [0])
        Shard(load(tmp_path, tp, kernels), num_blocks=1).step([(log, len(ids))])
        return log.logits

    row = run_ranks(4, work)[0][len(ids)]  # type: ignore[index]
    with torch.no_grad():
        torch.testing.assert_close(row, model(torch.tensor([ids])).logits[0, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("path", [LLAMA, QWEN2], ids=lambda p: p.name)
def test_greedy_ids_of_the_shipped_models_equal_their_references(path: Path, size: int, kernels: CpuKernels) -> None:
    references = json.loads((path / "reference.json").read_text())["greedy"]

    def work(tp: TensorParallel) -> list[Log]:
        shard = Shard(load(path, tp, kernels), num_blocks=16 * len(references))
        logs = [Log(list(r["prompt_ids"]), list(range(i * 16, (i + 1) * 16))) for i, r in enumerate(references)]
        # Ranks other than the first have no logits; the recorded id is what the first must find.
        coming = [iter(r["generated_ids"]) for r in references]
        while work := [(log, len(log.ids) - log.computed) for log in logs if log.computed < len(log.ids)]:
            shard.step(work)
            for log, following in zip(logs, coming, strict=True):
                log.ids += [i for i in (next(following, None),) if i is not None]
        return logs

    for log, reference in zip(run_ranks(size, work)[0], references, strict=True):  # type: ignore[call-overload]
        start = len(reference["prompt_ids"])
        found = [int(log.logits[start + i].argmax()) for i in range(len(reference["generated_ids"]))]
        assert found == reference["generated_ids"]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("path", [LLAMA, QWEN2], ids=lambda p: p.name)
def test_a_rank_reads_its_own_slices_only(path: Path, size: int, kernels: CpuKernels) -> None:
    plan = plan_model(path, world_size=size, dtype="float32")

    def work(tp: TensorParallel) -> int:
        checkpoint = Checkpoint(plan.index)
        loader = Loader(checkpoint, plan.linears.__getitem__, tp, kernels, torch.float32, plan.settings.hidden_size)
        registry.build(loader, plan.settings)
        return checkpoint.bytes_read

    # The plan counts four bytes for each weight, the files have two.
    assert run_ranks(size, work) == [plan.weight_bytes_per_rank // 2] * size


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_checkpoints_of_two_bytes_are_served_wider(dtype: torch.dtype, kernels: CpuKernels, tmp_path: Path) -> None:
    save("llama", tmp_path, dtype)
    model = hf.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    check(run_ranks(1, lambda tp: generate(tmp_path, tp, kernels, 7))[0], model)  # type: ignore[arg-type]


def test_a_step_without_sampled_rows_gives_no_logits(kernels: CpuKernels) -> None:
    calls: list[int] = []
    decoder = run_ranks(1, lambda tp: load(QWEN2, tp, kernels))[0]
    log = Log([1, 5, 9], [3])
    Shard(decoder).step([(log, 2)], on_layer=lambda: calls.append(1))  # type: ignore[arg-type]
    assert not log.logits
    assert len(calls) == 4


def test_every_architecture_whose_settings_are_read_is_built() -> None:
    assert set(registry.MODULES) == set(FAMILIES)
