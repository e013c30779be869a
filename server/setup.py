"""Generates `text_generation_server/pb/` from `proto/shard.proto`, for wheels and for editable installs."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
PROTO = HERE.parent / "proto"
TARGET = HERE / "text_generation_server" / "pb"


def generate() -> None:
    """Runs the protoc that comes with grpcio-tools; makes the generated import relative."""
    from grpc_tools import protoc

    TARGET.mkdir(exist_ok=True)
    arguments = ["protoc", f"-I{PROTO}", f"--python_out={TARGET}", f"--pyi_out={TARGET}", f"--grpc_python_out={TARGET}"]
    if protoc.main([*arguments, str(PROTO / "shard.proto")]) != 0:
        raise RuntimeError(f"protoc failed on {PROTO / 'shard.proto'}")
    service = TARGET / "shard_pb2_grpc.py"
    service.write_text(service.read_text().replace("import shard_pb2 as", "from . import shard_pb2 as"))
    (TARGET / "__init__.py").write_text('"""Generated from proto/shard.proto; not in git."""\n')


class Build(build_py):
    """Generates first, so that what is packed is complete."""

    def run(self) -> None:
        generate()
        super().run()


setup(cmdclass={"build_py": Build})
