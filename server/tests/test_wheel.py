"""The wheel, built where nothing has been generated or built before, as in an image."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from packaging.metadata import Metadata

ROOT = Path(__file__).parents[2]


def test_a_wheel_from_a_fresh_tree_holds_what_is_generated(tmp_path: Path) -> None:
    package = ROOT / "server" / "text_generation_server"
    kept_out = shutil.ignore_patterns("pb", "__pycache__", "libkernels.*")
    shutil.copytree(package, tmp_path / "server" / "text_generation_server", ignore=kept_out)
    (tmp_path / "server" / "THIRD_PARTY_NOTICES").write_text("of others")
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
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
    archive = zipfile.ZipFile(wheel)
    names = set(archive.namelist())
    wanted = {f"text_generation_server/pb/{name}" for name in ("__init__.py", "shard_pb2.py", "shard_pb2_grpc.py")}
    sources = {str(path.relative_to(ROOT / "server")) for path in package.rglob("*.py") if "pb" not in path.parts}
    assert wanted <= names and sources <= names, (wanted | sources) - names
    (written,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    # Judged by what package indices judge with.
    metadata = Metadata.from_email(archive.read(written), validate=True)
    assert metadata.description == (ROOT / "server" / "README.md").read_text()
    assert metadata.description_content_type == "text/markdown" and metadata.license_expression == "Apache-2.0"
    assert metadata.license_files == ["LICENSE", "THIRD_PARTY_NOTICES"]
    licences = written.replace("METADATA", "licenses")
    assert archive.read(f"{licences}/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert archive.read(f"{licences}/THIRD_PARTY_NOTICES") == b"of others"
