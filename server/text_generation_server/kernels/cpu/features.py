"""What the processor can do, without torch."""

from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def _flags(cpuinfo: Path) -> set[str]:
    try:
        text = cpuinfo.read_text()
    except OSError:
        return set()
    return set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())


def computes_bfloat16(cpuinfo: Path = CPUINFO) -> bool:
    """Whether the processor multiplies bfloat16 natively (AVX512-BF16 or AMX)."""
    return bool(_flags(cpuinfo) & {"avx512_bf16", "amx_bf16"})


def multiplies_bfloat16(cpuinfo: Path = CPUINFO) -> bool:
    """Whether oneDNN has products of bfloat16 weights for the processor, native or not: it wants these of AVX512."""
    return _flags(cpuinfo) >= {"avx512vl", "avx512bw", "avx512dq"}
