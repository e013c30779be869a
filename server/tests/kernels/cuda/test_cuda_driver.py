"""Calls of the CUDA driver, against one that only writes them down; and what is said where there is none."""

import ctypes
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from text_generation_server.errors import ConfigError
from text_generation_server.kernels.cuda.driver import Gpu, GpuModule
from text_generation_server.kernels.cuda.kernels import CudaKernels
from text_generation_server.kernels.cuda.libcuda import Driver, DriverError, VisibleGpu, check_torch, visible_gpus
from text_generation_server.kernels.select import compute_dtype, select_kernels


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    source = Path(__file__).with_name("fake_driver.cpp")
    subprocess.run(["c++", "-O1", "-shared", "-fPIC", "-o", made, source], check=True)
    return made


class Fake:
    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._library = ctypes.CDLL(self.path)
        self._library.fake_calls.restype = ctypes.c_char_p
        self.set(1, 90)

    def set(self, devices: int, capability: int) -> None:
        self._library.fake_set(devices, capability)

    @property
    def calls(self) -> list[str]:
        return self._library.fake_calls().decode().splitlines()


@pytest.fixture
def fake(library: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    monkeypatch.setattr(Gpu, "stream", lambda self: 4711)
    return Fake(library)


def test_a_kernel_is_launched_on_torchs_stream_with_its_arguments(fake: Fake, tmp_path: Path) -> None:
    gpu = Gpu(0, Driver(fake.path), tmp_path)
    assert (gpu.architecture, gpu.num_processors, gpu.device) == ("sm_90", 132, torch.device("cuda", 0))
    module = gpu.module("elements.cu", {"BF16": 1})
    assert gpu.module("elements.cu", {"BF16": 1}) is module
    x = torch.zeros(4)
    module.launch("rms_norm", (3, 2, 1), 64, 100, 7, 0.25, x, None)
    launch = f"launch rms_norm 3 2 1, 64 1 1, 100, stream 4711: 7 0.25 {x.data_ptr():x} 0 extra 0"
    assert fake.calls == [f"current {0x1234}", "load", launch]


def test_much_shared_memory_is_asked_for_once(fake: Fake, tmp_path: Path) -> None:
    module = Gpu(0, Driver(fake.path), tmp_path).module("elements.cu", {"BF16": 1})
    for shared in (48 << 10, 50_000, 60_000, 55_000):
        module.launch("rotate", (1, 1, 1), 32, shared, 1, 1.0, None, None)
    assert [call for call in fake.calls if call.startswith("attribute")] == [
        "attribute rotate 8 50000",
        "attribute rotate 8 60000",
    ]


def test_every_thread_has_the_context(fake: Fake, tmp_path: Path) -> None:
    module = Gpu(0, Driver(fake.path), tmp_path).module("elements.cu", {"BF16": 1})
    thread = threading.Thread(target=lambda: module.launch("rotate", (1, 1, 1), 32, 0, 1, 1.0, None, None))
    thread.start()
    thread.join()
    assert sum(call.startswith("current") for call in fake.calls) == 2


def test_what_the_driver_refuses_is_told_by_its_name(fake: Fake, tmp_path: Path) -> None:
    gpu = Gpu(0, Driver(fake.path), tmp_path)
    with pytest.raises(DriverError, match="cuModuleLoadData failed: CUDA_ERROR_INVALID_IMAGE"):
        GpuModule(gpu, b"no cubin")
    with pytest.raises(DriverError, match="cuModuleGetFunction failed: CUDA_ERROR_NOT_FOUND"):
        gpu.module("elements.cu", {"BF16": 1}).launch("missing", (1, 1, 1), 32, 0)


def test_machines_without_a_gpu_that_serves_are_refused(fake: Fake, tmp_path: Path) -> None:
    with pytest.raises(DriverError, match="driver was not found"):
        Driver(str(tmp_path / "none.so"))
    fake.set(0, 90)
    with pytest.raises(DriverError, match="sees no GPU"):
        Driver(fake.path)
    fake.set(1, 70)
    with pytest.raises(DriverError, match=r"capability 7\.0; at least 7\.5"):
        Gpu(0, Driver(fake.path))
    with pytest.raises(DriverError, match="GPU 1 of 1"):
        Gpu(1, Driver(fake.path))


def test_what_gpus_offer_is_told_without_keeping_any_of_them(fake: Fake) -> None:
    fake.set(2, 75)
    gpus = visible_gpus(driver=Driver(fake.path))
    assert gpus == [VisibleGpu(i, f"NVIDIA Paper {i}", (7, 5), 60 << 30, 80 << 30, has_bfloat16=False) for i in (0, 1)]
    assert fake.calls == [f"current {0x1234}", "release 0", f"current {0x1234}", "release 1"]
    assert visible_gpus(1, Driver(fake.path)) == gpus[:1]


def test_more_shards_than_gpus_are_refused_before_a_gpu_is_touched(fake: Fake) -> None:
    fake.set(2, 90)
    with pytest.raises(DriverError, match=r"--num-shard 3 .* shows 2 \(see CUDA_VISIBLE_DEVICES\); use --num-shard 2$"):
        visible_gpus(3, Driver(fake.path))
    fake.set(2, 70)
    with pytest.raises(DriverError, match=r"GPU 0 \(NVIDIA Paper 0\) has compute capability 7\.0"):
        visible_gpus(1, Driver(fake.path))
    assert fake.calls == []


def test_a_driver_that_cannot_start_says_so_with_what_to_do(fake: Fake) -> None:
    fake.set(-1, 90)
    with pytest.raises(DriverError, match=r"no usable GPU \(cuInit failed: CUDA_ERROR_NO_DEVICE\); .*--gpus all"):
        Driver(fake.path)


def test_another_library_of_that_name_is_no_driver(tmp_path: Path) -> None:
    source, made = tmp_path / "other.c", tmp_path / "libcuda.so.1"
    source.write_text("int cuInit(unsigned flags) { return (int) flags; }")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", made, source], check=True)
    with pytest.raises(DriverError, match=r"libcuda\.so\.1 is no NVIDIA driver .*: it has no cuGetErrorName"):
        Driver(str(made))


def test_a_gpu_that_others_fill_is_named_with_what_to_do(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(fake.path)

    def memory(device: int) -> tuple[int, int]:
        raise DriverError("cuDevicePrimaryCtxRetain failed: CUDA_ERROR_OUT_OF_MEMORY")

    monkeypatch.setattr(driver, "memory", memory)
    with pytest.raises(DriverError, match=r"GPU 0 \(NVIDIA Paper 0\) cannot be used: .*; end what uses it"):
        visible_gpus(1, driver)
    for count in (0, -1):
        with pytest.raises(DriverError, match=f"--num-shard {count}; expected at least 1"):
            visible_gpus(count, driver)


def test_a_torch_for_processors_alone_is_told_without_importing_it(tmp_path: Path) -> None:
    version = tmp_path / "version.py"
    version.write_text("__version__ = '2.13.0+cpu'\ncuda = None\n")
    with pytest.raises(DriverError, match=r"torch 2\.13\.0\+cpu is built for processors alone; .*--device cpu"):
        check_torch(version)
    version.write_text("__version__ = '2.13.0+cu130'\ncuda = '13.0'\n")
    check_torch(version)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use a GPU here")
def test_what_torch_cannot_use_is_refused_in_a_line_though_the_driver_is_there(fake: Fake, tmp_path: Path) -> None:
    with pytest.raises(DriverError, match=r"torch .* cannot use cuda:0: .+; update NVIDIA's driver") as refused:
        Gpu(0, Driver(fake.path), tmp_path).streams  # noqa: B018
    assert "\n" not in str(refused.value)


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built for processors alone")
def test_the_command_that_the_launcher_asks_answers_without_torch(library: Path) -> None:
    code = (
        "import sys\nfrom text_generation_server import cli\n"
        "try:\n    cli.app(args=sys.argv[1:], standalone_mode=False)\nexcept SystemExit as e:\n    sys.exit(e.code)\n"
        "finally:\n    assert 'torch' not in sys.modules\n"
    )

    def ask(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        places = {"PYTHONPATH": ":".join(sys.path), "LD_LIBRARY_PATH": str(library.parent), "PATH": os.environ["PATH"]}
        env = places | env
        command = [sys.executable, "-c", code, "devices", *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)

    gpus = json.loads(ask(FAKE_GPUS="2", FAKE_CAPABILITY="75").stdout)
    assert [(gpu["name"], gpu["free_bytes"], gpu["has_bfloat16"]) for gpu in gpus] == [
        ("NVIDIA Paper 0", 60 << 30, False),
        ("NVIDIA Paper 1", 60 << 30, False),
    ]
    refused = ask("--num-shard", "3", FAKE_GPUS="2")
    assert "--device cuda: --num-shard 3 needs as many GPUs" in refused.stderr, refused
    missing = ask(LD_LIBRARY_PATH="")
    if "was not found" in missing.stderr:  # no GPU here
        (line,) = missing.stderr.splitlines()
        assert line.startswith("error: --device cuda: the NVIDIA driver was not found")
        assert "--device cpu" in line


def test_the_device_is_chosen_by_name_and_refused_where_there_is_none(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("text_generation_server.kernels.cuda.libcuda.LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(ConfigError, match="--device cuda: the NVIDIA driver was not found"):
        select_kernels("cuda")
    monkeypatch.setattr("text_generation_server.kernels.cuda.libcuda.LIBRARY", fake.path)
    kernels = select_kernels("cuda", kernel_cache=tmp_path / "kernels")
    assert isinstance(kernels, CudaKernels) and kernels.device == torch.device("cuda", 0)
    kernels._elements(torch.bfloat16)
    assert list((tmp_path / "kernels").glob("elements-sm_90-*.cubin"))
    fake.set(1, 75)
    with pytest.raises(ConfigError, match="bfloat16 needs compute capability"):
        select_kernels("cuda").linear(torch.zeros(16, 16, dtype=torch.bfloat16))


def test_dtypes_of_gpus() -> None:
    assert compute_dtype("cuda", None, quantized=False) == "bfloat16"
    assert compute_dtype("cuda", "float16", quantized=True) == "float16"
    with pytest.raises(ConfigError, match="float32"):
        compute_dtype("cuda", "float32", quantized=False)
