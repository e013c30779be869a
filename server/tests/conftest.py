"""Shared fixtures."""

import os

# Before torch is imported: threads that spin for each other starve when other processes want the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from functools import lru_cache

import pytest
import torch
from emulated_avx512 import use_emulated_library
from emulated_tiles import add_emulated_tiles
from text_generation_server.kernels.cpu.kernels import CpuKernels
from text_generation_server.kernels.cpu.native.library import ON_DEMAND, Library


@pytest.fixture(scope="session")
def one_thread_kernels() -> CpuKernels:
    """The CPU backend with everything proven for one thread; the proofs are shared by all tests."""
    torch.set_num_threads(1)
    return CpuKernels()


@pytest.fixture
def kernels(one_thread_kernels: CpuKernels) -> CpuKernels:
    torch.set_num_threads(1)
    return one_thread_kernels


use_emulated_library()
add_emulated_tiles()
# "none": torch's operators alone. The others: our own products, in every variant that this processor executes, and that
# with tiles whether it has them or not; what serves on demand alone with AMX=1 (`make test-amx`); all of AVX-512 on any
# processor with EMULATE_AVX512=1 (`make test-emulated`).
INSTRUCTION_SETS = [
    "none",
    *(name for name, runs in Library().variants.items() if runs and (name not in ON_DEMAND or os.environ.get("AMX"))),
]


@lru_cache
def kernels_of(instruction_set: str) -> CpuKernels:
    return CpuKernels(instruction_set)


@pytest.fixture(params=INSTRUCTION_SETS)
def every_kernels(request: pytest.FixtureRequest) -> CpuKernels:
    """The CPU backend in each of its forms, in turn."""
    torch.set_num_threads(1)
    return kernels_of(request.param)
