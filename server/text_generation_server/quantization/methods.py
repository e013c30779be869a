"""What each method's settings mean: for every layer, whether it should be quantized and how. Never imports torch.

Every key that is known is in one of three places: read here, without influence on the meaning (`KEYS_OF_MAKING`), or
refused unless it has the one value that changes nothing (`must_be`). Keys that nobody knows are named in the log.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Protocol

from ..checkpoint.index import TensorInfo
from ..errors import CheckpointError
from .awq import Awq
from .bitsandbytes import OUTLIER_THRESHOLD, Bitsandbytes4bit, Bitsandbytes8bit
from .detect import SIZES, Settings, read_small
from .format import WeightFormat
from .fp8 import Fp8
from .gptq import Gptq
from .rules import HEAD, Override, Skipped, read_dynamic, read_names

Index = Mapping[str, TensorInfo]
FLOAT8 = {"F8_E4M3": "e4m3fn", "F8_E5M2": "e5m2"}

# How the weights were made, and which kernel they were meant for.
KEYS_OF_MAKING = frozenset({
    "act_group_aware", "auto_forward_data_parallel", "backend", "batch_size", "block_name_to_quantize",
    "cache_block_outputs", "cache_examples_on_gpu", "damp_auto_increment", "damp_percent", "dataset", "device",
    "disable_exllama", "do_fuse", "exllama_config", "fuse_max_seq_len", "hyb_act", "inside_layer_modules",
    "iters", "max_input_length", "meta", "model_file_base_name", "model_name_or_path", "model_seqlen",
    "module_name_preceding_first_block", "modules_to_fuse", "mse", "offload_to_disk", "offload_to_disk_path",
    "outside_layer_modules", "pack_impl", "pad_token_id", "quantizer", "static_groups", "tokenizer", "true_sequential",
    "use_cuda_fp16", "use_exllama", "v2", "v2_alpha", "vram_strategy", "quant_method",
})  # fmt: skip


class Method(Protocol):
    """How the layers of a checkpoint are quantized."""

    @property
    def flag(self) -> str:
        """The value of `--quantize` that asks for it."""
        ...

    @property
    def summary(self) -> str:
        """Its settings in a few words."""
        ...

    @property
    def unknown(self) -> list[str]:
        """Keys of the files that nobody knows."""
        ...

    def is_packed(self, layer: str) -> bool:
        """Whether the tensors of this layer are quantized."""
        ...

    def expected(self, layer: str) -> WeightFormat | None:
        """The format by the rules; None: not quantized."""
        ...

    def applied(self, layer: str) -> WeightFormat:
        """The format of a layer whose tensors are quantized though the rules do not say so."""
        ...


def unknown_keys(settings: Settings, known: frozenset[str]) -> list[str]:
    return sorted(set(settings) - known - KEYS_OF_MAKING)


def unknown_in(overrides: Sequence[Override], known: frozenset[str]) -> list[str]:
    """Keys inside rules for layers."""
    rules = [override.settings for override in overrides if override.settings is not None]
    return sorted({f"dynamic: {key}" for rule in rules for key in unknown_keys(rule, known)})


def _groups(size: int) -> str:
    return "one group" if size == -1 else f"groups of {size}"


class GptqMethod:
    """AutoGPTQ, GPTQModel, Optimum, TGI's own quantizer."""

    flag = "gptq"
    _KEYS = frozenset({
        "bits", "group_size", "sym", "desc_act", "format", "lm_head", "dynamic", "modules_in_block_to_quantize",
        "is_marlin_format", "pack_dtype", "rotation", "adapter", "sparsity", "awq_gemm_checkpoint", "zero_point",
        "preprocessors", "pre_filters",
    })  # fmt: skip

    def __init__(self, settings: Settings, index: Index):
        self.index, self.settings = index, settings
        settings.must_be("is_marlin_format", False)
        settings.must_be("awq_gemm_checkpoint", False)
        settings.must_be("pack_dtype", "int32")
        settings.must_be("sparsity", 0, 0.0)
        # A low-rank correction beside the weights; weights that were turned before they were rounded.
        for key in ("adapter", "rotation", "preprocessors", "pre_filters"):
            settings.must_be(key, {}, [], "")
        if "zero_point" in settings and settings.get("zero_point") is settings.get("sym"):
            raise settings.error("zero_point", f"the opposite of sym, which is {settings.get('sym')}, or nothing")
        self._borrows = "gptqmodel" in json.dumps(settings.get("meta") or "").lower()
        format_ = settings.word("format", ("gptq", "gptq_v2"), _MAKE_GPTQ)
        if format_ is None and self._borrows:
            raise settings.error("format", "gptq or gptq_v2 (called checkpoint_format), which GPTQModel always says")
        # AutoGPTQ and TGI wrote no format as long as there was but one.
        self.format = format_ or "gptq"
        self._base = self._format(settings, None)
        self._overrides = read_dynamic(settings)
        self._formats = [
            self._format(override.settings, settings) if override.settings else None for override in self._overrides
        ]
        self._only = [f".{name}" for name in read_names(settings, "modules_in_block_to_quantize")]
        self._head = settings.flag("lm_head") or False
        self.unknown = unknown_keys(settings, self._KEYS) + unknown_in(self._overrides, self._KEYS)

    @property
    def summary(self) -> str:
        sym, desc_act = self.settings.flag("sym"), self.settings.flag("desc_act")
        parts = [
            f"{self._base.bits} bits",
            _groups(self._base.group_size),
            {True: "symmetric", False: "asymmetric", None: "zero points as stored"}[sym],
            {True: "act-order", False: "no act-order", None: "act-order as g_idx says"}[desc_act],
        ]
        parts += ["gptq_v2"] if self.format == "gptq_v2" else []
        parts += [f"{len(self._overrides)} rules for layers"] if self._overrides else []
        return ", ".join(parts)

    def _format(self, settings: Settings, base: Settings | None) -> Gptq:
        """base: where a rule for some layers takes what it does not say."""
        if base is not None:
            self._check_override(settings)
        bits, group_size, sym, desc_act = (
            settings if base is None or key in settings else base for key in ("bits", "group_size", "sym", "desc_act")
        )
        order = desc_act.flag("desc_act")
        if order is None and (without := self._without_order()) is not None:
            raise desc_act.error(
                "desc_act", f"true or false (tensor {without}.g_idx, which would tell, is missing too)"
            )
        return Gptq(
            bits.integer("bits", (2, 3, 4, 8)),
            group_size.group_size(),
            # Zero points are read in any case; without `sym` they are not checked.
            sym=sym.flag("sym") or False,
            desc_act=order is not False,
            checkpoint_format=self.format,
            zeros_borrow=self._borrows,
        )

    def _check_override(self, settings: Settings) -> None:
        settings.must_be("quant_method", "gptq")
        settings.must_be("pack_dtype", "int32")
        settings.must_be("format", self.format)
        for key in ("adapter", "rotation", "preprocessors", "pre_filters"):
            settings.must_be(key, {}, [], "")

    def _without_order(self) -> str | None:
        """A layer without g_idx."""
        layers = (name.removesuffix(".qweight") for name in self.index if name.endswith(".qweight"))
        return next((layer for layer in layers if f"{layer}.g_idx" not in self.index), None)

    def is_packed(self, layer: str) -> bool:
        return f"{layer}.qweight" in self.index

    def expected(self, layer: str) -> WeightFormat | None:
        for override, format_ in zip(self._overrides, self._formats, strict=True):
            if override.pattern.matches(layer):
                return format_
        if layer == HEAD:
            return self._base if self._head else None
        if self._only and not layer.endswith(tuple(self._only)):
            return None
        return self._base

    def applied(self, layer: str) -> WeightFormat:
        return self._base


_MAKE_GPTQ = "serve the checkpoint that it was made from, or make it again in one of these"


class AwqMethod:
    """AutoAWQ, GPTQModel."""

    flag = "awq"
    _KEYS = frozenset({
        "bits", "group_size", "zero_point", "format", "modules_to_not_convert", "sym", "desc_act", "lm_head",
        "dynamic", "pack_dtype", "adapter", "rotation", "modules_in_block_to_quantize", "is_marlin_format",
    })  # fmt: skip

    def __init__(self, settings: Settings, index: Index):
        self.index = index
        settings.must_be("is_marlin_format", False)
        settings.must_be("pack_dtype", "int32")
        for key in ("adapter", "rotation"):
            settings.must_be(key, {}, [], "")
        if str(settings.get("backend")).lower() == "llm-awq":
            raise settings.error("backend", f"autoawq: llm-awq packs words in another order; {_MAKE_GEMM}")
        version = settings.word("format", ("gemm", "gemv"), _MAKE_GEMM)
        if version is None:
            raise settings.error("format", "gemm or gemv (called version by AutoAWQ)")
        zero_point = settings.flag("zero_point")
        if zero_point is None:
            raise settings.error("zero_point", "true or false")
        group_size = settings.group_size()
        self._base = Awq(settings.integer("bits", (4,)), group_size, zero_point, version)
        self._skipped = Skipped(settings, ("modules_to_not_convert",), also_inside=True)
        self._overrides = read_dynamic(settings)
        for override in self._overrides:
            if override.settings is not None:
                for key in ("bits", "group_size", "zero_point"):
                    override.settings.must_be(key, settings.get(key))
        self._head = settings.flag("lm_head") or False
        self.unknown = unknown_keys(settings, self._KEYS) + unknown_in(self._overrides, self._KEYS)
        points = "zero points" if zero_point else "symmetric"
        self.summary = f"4 bits, {_groups(group_size)}, {points}, {version}"

    def is_packed(self, layer: str) -> bool:
        return f"{layer}.qweight" in self.index

    def expected(self, layer: str) -> WeightFormat | None:
        for override in self._overrides:
            if override.pattern.matches(layer):
                return self._base if override.settings is not None else None
        if layer in self._skipped or (layer == HEAD and not self._head):
            return None
        return self._base

    def applied(self, layer: str) -> WeightFormat:
        return self._base


_MAKE_GEMM = "make it again with AutoAWQ's version gemm"


class BitsandbytesMethod:
    """4 and 8 bits as transformers saves them."""

    _KEYS = frozenset({
        "load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit", "bnb_4bit_quant_type",
        "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage", "llm_int8_skip_modules", "llm_int8_has_fp16_weight",
        "llm_int8_threshold",
        # Of the product, which is computed from the weights as they are.
        "bnb_4bit_compute_dtype", "llm_int8_enable_fp32_cpu_offload",
    })  # fmt: skip

    def __init__(self, settings: Settings, index: Index):
        self.index, self.settings = index, settings
        four, eight = (self._loads(f"load_in_{bits}bit") for bits in (4, 8))
        if four == eight:
            found = "both" if four else "neither"
            raise settings.error("load_in_4bit", f"one of load_in_4bit and load_in_8bit to be true, found {found}")
        settings.must_be("bnb_4bit_quant_storage", "uint8", "torch.uint8")
        settings.must_be("llm_int8_has_fp16_weight", False)
        self.kind = settings.word("bnb_4bit_quant_type", ("nf4", "fp4")) if four else None
        if four and self.kind is None:
            raise settings.error("bnb_4bit_quant_type", "nf4 or fp4")
        self.outlier_threshold = self._threshold()
        self.nested = (settings.flag("bnb_4bit_use_double_quant") or False) if four else False
        self._skipped = Skipped(settings, ("llm_int8_skip_modules",))
        self.flag = f"bitsandbytes-{self.kind}" if four else "bitsandbytes"
        self.unknown = unknown_keys(settings, self._KEYS)
        nested = ", nested absmax" if self.nested else ""
        self.summary = f"4 bits, {self.kind}{nested}" if four else self.applied("").name.removeprefix("bitsandbytes ")

    def _loads(self, key: str) -> bool:
        stated = {value for name in (key, f"_{key}") if (value := self.settings.flag(name)) is not None}
        if len(stated) > 1:
            raise self.settings.error(key, f"the same as _{key}")
        return stated == {True}

    def _threshold(self) -> float:
        value = self.settings.get("llm_int8_threshold")
        if value is None:
            return OUTLIER_THRESHOLD
        if type(value) not in (int, float) or not 0 <= value < 3e38:
            raise self.settings.error("llm_int8_threshold", "a number of at least 0; 0: no activation is an outlier")
        return float(value)

    def is_packed(self, layer: str) -> bool:
        return f"{layer}.weight" in self.index and self.index[f"{layer}.weight"].dtype in ("U8", "I8")

    def expected(self, layer: str) -> WeightFormat | None:
        # A list of layers to skip replaces transformers' own, which is the head.
        skipped = layer in self._skipped if self._skipped else layer == HEAD
        return None if skipped else self.applied(layer)

    def applied(self, layer: str) -> WeightFormat:
        if self.kind is None:
            return Bitsandbytes8bit(self.outlier_threshold)
        return Bitsandbytes4bit(self.kind, self.nested, self._block_size(layer))

    def _block_size(self, layer: str) -> int:
        """What the tensor that describes the others says; transformers' 64 where it is missing, which is refused."""
        name = f"{layer}.weight.quant_state.bitsandbytes__{self.kind}"
        if name not in self.index:
            return 64
        info = self.index[name]
        try:
            state = json.loads(read_small(info))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{info.path}: tensor {name} is not JSON: {error}; fetch the file again") from error
        size = state.get("blocksize") if isinstance(state, dict) else None
        if type(size) is not int or not (0 < size <= 1 << 16) or size & (size - 1):
            raise CheckpointError(
                f"{info.path}: tensor {name} says blocksize {size!r}; expected a power of two; fetch the file again"
            )
        return size


class Fp8Method:
    """8-bit floats as DeepSeek, AutoFP8 and fbgemm store them."""

    flag = "fp8"
    _KEYS = frozenset({
        "weight_block_size", "fmt", "scale_fmt", "modules_to_not_convert", "ignored_layers", "modules_to_convert",
        "kv_cache_scheme", "expert_dtype",
        # Of activations, which are not rounded.
        "activation_scheme", "activation_scale_ub", "dequantize",
    })  # fmt: skip

    def __init__(self, settings: Settings, index: Index):
        self.index = index
        settings.must_be("kv_cache_scheme", {})
        settings.must_be("modules_to_convert", [])
        settings.must_be("expert_dtype", "fp8")
        settings.word("fmt", ("e4m3", "e5m2", "float8_e4m3fn", "float8_e5m2"))
        settings.word("scale_fmt", ("float", "ue8m0"))
        settings.word("activation_scheme", ("dynamic", "static"))
        self.block = block_structure(settings, "weight_block_size")
        self._by_row = settings.method == "fbgemm_fp8"
        self._skipped = Skipped(settings, ("modules_to_not_convert", "ignored_layers"))
        self._skips = "modules_to_not_convert" in settings or "ignored_layers" in settings
        self.unknown = unknown_keys(settings, self._KEYS)
        of = "each output" if self._by_row else "the tensor or each output, as stored"
        scales = f"blocks of {self.block[0]} x {self.block[1]}" if self.block else of
        self.summary = f"8-bit floats, scales of {scales}, activations not quantized"

    def is_packed(self, layer: str) -> bool:
        return f"{layer}.weight" in self.index and self.index[f"{layer}.weight"].dtype in FLOAT8

    def expected(self, layer: str) -> WeightFormat | None:
        skipped = layer in self._skipped if self._skips else layer == HEAD
        return None if skipped else self.applied(layer)

    def applied(self, layer: str) -> WeightFormat:
        return float8(self.index, layer, self.block, "channel" if self._by_row else None)


def block_structure(settings: Settings, key: str) -> tuple[int, int] | None:
    value = settings.get(key)
    if isinstance(value, str):
        value = [int(part) if part.isdecimal() else 0 for part in value.split("x")]
    if value is None:
        return None
    # Where blocks need not divide the features, others than powers of two could not be told from a mistake.
    if (
        not isinstance(value, list)
        or len(value) != 2
        or any(type(v) is not int or v not in SIZES or v & (v - 1) for v in value)
    ):
        raise settings.error(key, "two numbers of features that are powers of two, such as [128, 128]")
    return value[0], value[1]


def float8(index: Index, layer: str, block: tuple[int, int] | None, scale: str | None) -> Fp8:
    """The format of a layer of 8-bit floats. scale: `tensor`, `channel`; None: whichever its tensors show."""
    weight = index.get(f"{layer}.weight")
    kind = FLOAT8.get(weight.dtype, "e4m3fn") if weight is not None else "e4m3fn"
    suffix = next(
        (suffix for suffix in ("weight_scale", "weight_scale_inv") if f"{layer}.{suffix}" in index),
        "weight_scale_inv" if block else "weight_scale",
    )
    static = any(f"{layer}.{name}" in index for name in ("input_scale", "activation_scale"))
    if block is not None:
        return Fp8("block", block, kind, suffix, static)
    if scale is None:
        stored = index.get(f"{layer}.{suffix}")
        of_rows = stored is not None and stored.shape[:1] not in ((), (1,))
        scale = "channel" if of_rows else "tensor"
    return Fp8(scale, kind=kind, scale_suffix=suffix, input_scale=static)
