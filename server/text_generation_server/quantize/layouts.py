"""Stored tensors of a quantized linear, in the layouts that other tools read."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from ..quantization.bitsandbytes import BLOCK, STATE
from ..quantization.blocks import TABLES, round_rows_to_int8, round_to_table
from ..quantization.packing import pack_gemm, pack_words
from .rounding import Codes

Tensors = dict[str, Tensor]


def gptq_tensors(codes: Codes, checkpoint_format: str) -> Tensors:
    """AutoGPTQ's layouts: `gptq`, in which stored zero points are one less than they are, or `gptq_v2`."""
    stored = codes.zeros - 1 if checkpoint_format == "gptq" else codes.zeros
    return {
        "qweight": pack_words(codes.codes, codes.bits).T.contiguous(),
        "qzeros": pack_words(stored.T.contiguous() & (2**codes.bits - 1), codes.bits),
        "scales": codes.scales.T.contiguous(),
        "g_idx": codes.group_of.to(torch.int32),
    }


def awq_tensors(codes: Codes) -> Tensors:
    """AutoAWQ's `gemm`."""
    return {
        "qweight": pack_gemm(codes.codes.T.contiguous()),
        "qzeros": pack_gemm(codes.zeros.T.contiguous()),
        "scales": codes.scales.T.contiguous(),
    }


def nf4_tensors(weight: Tensor, kind: str, stored_dtype: str) -> Tensors:
    """As transformers saves bitsandbytes' 4 bits, with plain absmax. weight: float [out, in], on the host.

    stored_dtype: of the weight in the model that was quantized: what bitsandbytes dequantizes to.
    """
    table = torch.tensor(TABLES[kind], dtype=torch.float32)
    codes, absmax = round_to_table(weight.reshape(-1), table, BLOCK, is_end=True)
    if len(codes) % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    state = {"quant_type": kind, "blocksize": BLOCK, "dtype": stored_dtype, "shape": list(weight.shape)}
    return {
        "weight": ((codes[::2] << 4) | codes[1::2])[:, None].contiguous(),
        "weight.absmax": absmax,
        "weight.quant_map": table,
        STATE + kind: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def int8_tensors(weight: Tensor) -> Tensors:
    """As transformers saves LLM.int8. weight: float [out, in], on the host."""
    codes, absmax = round_rows_to_int8(weight, range(weight.shape[1]))
    return {
        "weight": (codes ^ 128).view(torch.int8),
        "SCB": absmax,
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
