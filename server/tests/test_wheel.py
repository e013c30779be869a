"""The wheel, built where nothing has been generated or built before, as in an image."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_wheel_from_a_fresh_tree_holds_what_is_generated(tmp_path: Path) -> None:
    package = ROOT / "server" / "text_generation_server"
    kept_out = shutil.ignore_patterns("pb", "__pycache__", "libkernels.*")
    shutil.copytree(package, tmp_path / "server" / "text_generation_server", ignore=kept_out)
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / "server" / name, tmp_path / "server" / name)
    shutil.copytree(ROOT / "proto", tmp_path / "proto")
    shutil.copy(ROOT / "Cargo.toml", tmp_path)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    # Kernels take minutes to compile; that they are left out is said.
    done = subprocess.run(
        [*command, str(tmp_path / "dist"), str(tmp_path / "server")],
        env={**os.environ, "CXX": "no-such-compiler", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").iterdir()
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"text_generation_server/pb/{name}" for name in ("__init__.py", "shard_pb2.py", "shard_pb2_grpc.py")}
    sources = {str(path.relative_to(ROOT / "server")) for path in package.rglob("*.py") if "pb" not in path.parts}
    assert wanted <= names and sources <= names, (wanted | sources) - names
