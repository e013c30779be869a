"""Shared fixtures."""

import os

# Before torch is imported: threads that spin for each other starve when other processes want the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

from text_generation_server.kernels.cpu.kernels import CpuKernels


@pytest.fixture(scope="session")
def one_thread_kernels() -> CpuKernels:
    """The CPU backend with everything proven for one thread; the proofs are shared by all tests."""
    torch.set_num_threads(1)
    return CpuKernels()


@pytest.fixture
def kernels(one_thread_kernels: CpuKernels) -> CpuKernels:
    torch.set_num_threads(1)
    return one_thread_kernels
