"""Generates `text_generation_server/pb/` and builds the kernels, for wheels and for editable installs.

The environment's TEXT_GENERATION_BINARIES names the folder of the Rust programs that a wheel is to bring along,
GIT_COMMIT what it is made from (`scripts/wheel.sh` sets both).
"""

import os
import runpy
import sys
import tomllib
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
PROTO = HERE.parent / "proto"
TARGET = HERE / "text_generation_server" / "pb"
PROGRAMS = ("text-generation-launcher", "text-generation-router", "text-generation-benchmark")
KERNELS = HERE / "text_generation_server" / "kernels" / "cpu" / "native"


def generate() -> None:
    """Runs the protoc that comes with grpcio-tools; makes the generated import relative."""
    from grpc_tools import protoc

    arguments = ["protoc", f"-I{PROTO}", f"--python_out={TARGET}", f"--pyi_out={TARGET}", f"--grpc_python_out={TARGET}"]
    if protoc.main([*arguments, str(PROTO / "shard.proto")]) != 0:
        raise RuntimeError(f"protoc failed on {PROTO / 'shard.proto'}")
    service = TARGET / "shard_pb2_grpc.py"
    service.write_text(service.read_text().replace("import shard_pb2 as", "from . import shard_pb2 as"))


def make_package() -> None:
    """The folder has to be there when packages are looked for, which is before anything is built."""
    TARGET.mkdir(exist_ok=True)
    (TARGET / "__init__.py").write_text('"""Generated from proto/shard.proto; not in git."""\n')


def build_kernels() -> None:
    """Without a compiler the package works too, more slowly."""
    reason = runpy.run_path(str(KERNELS / "build.py"))["build"](os.environ.get("CXX", "c++"))
    if reason is not None:
        print(f"kernels are not built, torch's operators serve instead: {reason}", file=sys.stderr)


class Build(build_py):
    """Generates first, so that what is packed is complete."""

    def run(self) -> None:
        generate()
        build_kernels()
        super().run()
        if not self.editable_mode and (commit := os.environ.get("GIT_COMMIT")):
            (Path(self.build_lib) / "text_generation_server" / "commit.txt").write_text(f"{commit}\n")


class BinaryDistribution(Distribution):
    """A wheel holds a library for one kind of processor."""

    def has_ext_modules(self) -> bool:
        return True


def version() -> str:
    """The workspace's, which all programs have."""
    return str(tomllib.loads((HERE.parent / "Cargo.toml").read_text())["workspace"]["package"]["version"])


def programs() -> list[tuple[str, list[str]]]:
    """What goes into the environment's `bin`, beside the scripts."""
    folder = os.environ.get("TEXT_GENERATION_BINARIES")
    return [("bin", [os.path.relpath(Path(folder) / name, HERE) for name in PROGRAMS])] if folder else []


make_package()
setup(version=version(), data_files=programs(), cmdclass={"build_py": Build}, distclass=BinaryDistribution)
