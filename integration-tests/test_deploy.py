"""What stands under deploy/, as far as it can be judged without an engine of containers."""

import json
import os
import re
import shutil
import socket
import subprocess
import tomllib
from pathlib import Path

import pytest
from conftest import LLAMA, ROOT
from support.server import BINARIES, Server

DOCKERFILE = (ROOT / "Dockerfile").read_text()
ENTRY = ROOT / "deploy" / "entrypoint-sagemaker.sh"


def entry(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The SageMaker entry with a launcher that prints its arguments and environment."""
    launcher = folder / "text-generation-launcher"
    launcher.write_text('#!/bin/sh\necho "$@"\nenv\n')
    launcher.chmod(0o755)
    variables = {"PATH": f"{folder}:{os.environ['PATH']}", **environment}
    return subprocess.run([ENTRY, *arguments], env=variables, capture_output=True, text=True, timeout=10, check=False)


# SageMaker starts `IMAGE serve`.
@pytest.mark.parametrize("arguments", [["serve"], []], ids=str)
def test_the_sagemaker_entry_tells_the_launcher_what_it_was_told(tmp_path: Path, arguments: list[str]) -> None:
    done = entry(
        tmp_path, *arguments, "--json-output", HF_MODEL_ID="org/model", HF_MODEL_REVISION="v1", SM_NUM_GPUS="2",
        HF_MODEL_QUANTIZE="gptq", HF_MODEL_TRUST_REMOTE_CODE="true",
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[0] == "--json-output", done
    expected = {"MODEL_ID=org/model", "REVISION=v1", "NUM_SHARD=2", "QUANTIZE=gptq", "TRUST_REMOTE_CODE=true"}
    # It is asked on this port, and killed 30 seconds after it was asked to end.
    expected |= {"PORT=8080", "GRACEFUL_TERMINATION_TIMEOUT=25"}
    assert expected <= set(lines), lines


def test_the_sagemaker_entry_leaves_out_what_is_empty(tmp_path: Path) -> None:
    done = entry(tmp_path, HF_MODEL_ID="org/model", HF_MODEL_QUANTIZE="", SM_NUM_GPUS="0")
    assert done.returncode == 0 and not re.search(r"^(QUANTIZE|NUM_SHARD|REVISION)=", done.stdout, re.MULTILINE), done


def test_the_sagemaker_entry_wants_a_model(tmp_path: Path) -> None:
    done = entry(tmp_path)
    assert done.returncode == 1 and "HF_MODEL_ID is not set" in done.stderr, done


def test_an_empty_variable_is_one_left_out() -> None:
    command = [BINARIES / "text-generation-launcher", "--model-id", "no/such/folder/anywhere"]
    empty = {"QUANTIZE": "", "NUM_SHARD": "", "PORT": "", "API_KEY_FILE": "", "DTYPE": "", "JSON_OUTPUT": ""}
    done = subprocess.run(command, env={**os.environ, **empty}, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1 and "there is no such directory" in done.stdout + done.stderr, done


# What stands in start scripts and charts for TGI 3.
MADE_FOR_TGI = {
    "PROMETHEUS_PORT": "9000",
    "MASTER_PORT": "29500",
    "CUDA_GRAPHS": "1,2,4,8,16,32",
    "CUDA_MEMORY_FRACTION": "0.9",
    "SPECULATE": "3",
    "ATTENTION": "flashinfer",
    "PREFIX_CACHING": "0",
    "PREFILL_CHUNKING": "0",
    "TGI_WIGGLE_ROOM": "0.95",
    "WAITING_SERVED_RATIO": "0.3",
    "MAX_WAITING_TOKENS": "20",
    "ENABLE_PREFILL_LOGPROBS": "true",
    "USAGE_STATS": "off",
    "HF_HUB_ENABLE_HF_TRANSFER": "1",
    "HF_API_TOKEN": "hf_nothing",
}


def test_a_server_starts_whatever_is_empty_and_in_an_environment_made_for_tgi() -> None:
    names = [
        "QUANTIZE",
        "MAX_INPUT_TOKENS",
        "MAX_BATCH_SIZE",
        "API_KEY_FILE",
        "CHAT_TEMPLATE",
        "OTLP_ENDPOINT",
        "REVISION",
    ]
    with Server(LLAMA, env=dict.fromkeys(names, "") | MADE_FOR_TGI) as server:
        assert server.generate("In the beginning", max_new_tokens=2)["details"]["generated_tokens"] == 2
        log = server.log()
    assert log.count("PROMETHEUS_PORT (environment) has no effect: metrics are on the main port, at /metrics") == 1, log
    silent = ("HOSTNAME", "HF_HUB_ENABLE_HF_TRANSFER", "HF_API_TOKEN", "USAGE_STATS")
    assert not [name for name in MADE_FOR_TGI if name not in silent and f"{name} (environment) has" not in log], log


def test_all_programs_have_one_version() -> None:
    names = ["launcher", "router", "server", "benchmark"]
    outputs = [
        subprocess.run([BINARIES / f"text-generation-{name}", "--version"], capture_output=True, text=True, check=True)
        for name in names
    ]
    versions = {done.stdout.split(" ", 1)[1].strip() for done in outputs}
    assert len(versions) == 1, versions
    if (ROOT / ".git").exists():
        assert re.fullmatch(r"\d+\.\d+\.\d+ \([0-9a-f]{12}\)", versions.pop())


def test_what_the_dockerfile_copies_is_not_ignored() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    from_context = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    sources = [name for line in from_context for name in line.split() if name != "."]
    assert sources
    assert not [name for name in sources if not any(name == keep or name.startswith(f"{keep}/") for keep in kept)]
    assert not [name for name in kept if not (ROOT / name).exists()]


@pytest.mark.parametrize("member", ["launcher", "router", "router/scheduler", "benchmark"])
def test_the_image_is_built_from_every_member(member: str) -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert any(member == keep or member.startswith(f"{keep}/") or keep == f"{member}/src" for keep in kept)


def context() -> list[Path]:
    """The files that a builder is sent: those in git that .dockerignore lets through."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] not in "#*"]
    kept = [line[1:] for line in lines if line.startswith("!")]
    left_out = [line for line in lines if not line.startswith("!")]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [
        ROOT / name
        for name in listed.splitlines()
        if any(name == keep or name.startswith(f"{keep}/") for keep in kept)
        and not any(name == out or name.startswith(f"{out}/") for out in left_out)
    ]


def test_a_builder_is_sent_sources_alone() -> None:
    names = {str(path.relative_to(ROOT)) for path in context()}
    assert {"Cargo.lock", "server/requirements.lock", "router/src/main.rs", "scripts/notices.py"} <= names
    # The manifest of the scheduler names one of its tests, so cargo wants to see it.
    tests = [name for name in names if "tests" in Path(name).parts and not name.startswith("router/scheduler/")]
    assert not tests and not [name for name in names if name.startswith(("models/", "benchmark/results", "docs/"))]
    assert sum(path.stat().st_size for path in context()) < 5_000_000


def stages() -> dict[str, str]:
    """The text of each stage of the Dockerfile, by name."""
    parts = re.split(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, flags=re.MULTILINE)
    return dict(zip(parts[2::3], parts[3::3], strict=True))


def test_a_change_of_the_sources_downloads_no_package_again() -> None:
    """Layers are made anew from the first one on that something was copied to which has changed."""
    build, packages = stages()["build"], stages()["packages"]
    assert re.findall(r"^COPY (.*)$", packages, re.MULTILINE) == [
        "server/pyproject.toml server/requirements.lock /opt/text-generation/share/packages/"
    ]
    assert "AS packages" in DOCKERFILE and "FROM packages AS runtime" in DOCKERFILE
    before, after = build.split("COPY . .")
    assert "scripts/rust.sh" in before and "apt-get install" in before
    assert "--no-deps" in after and not re.search(r"install (?!-q --no-deps)", after)


def test_the_image_says_which_version_it_is() -> None:
    (version,) = re.findall(r"^ARG VERSION=(.*)$", DOCKERFILE, re.MULTILINE)
    manifest = tomllib.loads((ROOT / "Cargo.toml").read_text())
    assert version == manifest["workspace"]["package"]["version"]
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\S+)="(.*?)"', stages()["runtime"]))
    assert labels["version"] == "${VERSION}" and labels["source"] == "${SOURCE}", labels
    assert labels["revision"] == "${GIT_COMMIT}" and labels["base.name"] == "${BASE}", labels


def listed(kind: str) -> dict[str, dict]:
    """The components of a list that `scripts/audit.sh` makes, by name."""
    command = [BINARIES / "python", ROOT / "scripts" / "sbom.py", kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return {component["name"]: component for component in json.loads(done.stdout)["components"]}


def test_the_lists_of_what_is_shipped_hold_that_alone() -> None:
    python, rust = listed("python"), listed("rust")
    assert {"torch", "grpcio", "safetensors", "typer"} <= python.keys()
    assert not {"pytest", "mypy", "ruff", "transformers", "mkdocs", "hypothesis", "openai"} & python.keys()
    assert python["torch"]["purl"].startswith("pkg:pypi/torch@")
    manifest = tomllib.loads((ROOT / "router" / "Cargo.toml").read_text())
    assert manifest["dependencies"].keys() <= rust.keys()
    # What makes code while a program is built is not in it.
    made_with = manifest["build-dependencies"].keys() - manifest["dependencies"].keys()
    assert made_with and not made_with & rust.keys()


def test_cargo_is_found_where_rustup_puts_it_and_else_named(tmp_path: Path) -> None:
    def run(home: Path, path: str) -> subprocess.CompletedProcess[str]:
        command = [BINARIES / "python", ROOT / "scripts" / "sbom.py", "rust"]
        environment = os.environ | {"HOME": str(home), "PATH": path}
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)

    (tmp_path / "bin").mkdir()
    done = run(tmp_path, str(tmp_path / "bin"))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("cargo was not found, on the PATH or in ~/.cargo/bin: `make install` sets it up")
    # A user's shell does not look into ~/.cargo/bin before the next login.
    cargo = shutil.which("cargo", path=f"{Path.home()}/.cargo/bin:{os.environ['PATH']}")
    assert cargo is not None
    if Path(cargo).parent.name == "bin" and Path(cargo).parent.parent.name == ".cargo":
        done = run(Path(cargo).parent.parent.parent, "/usr/bin:/bin")
        assert done.returncode == 0 and "bomFormat" in done.stdout, done.stderr


def test_the_notices_name_every_crate_that_is_linked_with_the_text_of_its_licence() -> None:
    command = [BINARIES / "python", ROOT / "scripts" / "notices.py"]
    notices = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    ours = {"text-generation-launcher", "text-generation-router", "text-generation-benchmark", "scheduler"}
    crates = {f"{name} {one['version']}" for name, one in listed("rust").items() if name not in ours}
    assert len(crates) > 150 and not [crate for crate in crates if f"\n{crate}: " not in notices]
    for words in ("Permission is hereby granted", "Apache License", "Oniguruma LICENSE"):
        assert words in notices, words


def test_no_registry_and_no_secret_stands_in_the_image() -> None:
    assert not re.search(r"https?://(?!127\.0\.0\.1)|TOKEN|API_KEY", DOCKERFILE)


def test_the_images_health_check_tells_whether_requests_are_computed(llama: Server) -> None:
    words = re.search(r"^HEALTHCHECK .*\\\n\s+CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    assert words is not None

    def code(port: int) -> int:
        # A proxy that all containers are told of is not meant for what is in the container.
        variables = {
            "PORT": str(port),
            "PATH": os.environ["PATH"],
            "HTTP_PROXY": "http://127.0.0.1:9",
            "http_proxy": "http://127.0.0.1:9",
        }
        return subprocess.run(
            json.loads(words[1]), env=variables, capture_output=True, timeout=10, check=False
        ).returncode

    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        assert code(nobody_listens.getsockname()[1]) != 0
    assert code(llama.port) == 0


def test_the_compose_file_names_what_is_there() -> None:
    yaml = pytest.importorskip("yaml")
    folder = ROOT / "deploy" / "compose"
    services = yaml.safe_load((folder / "compose.yaml").read_text())["services"]
    assert set(services) == {"server", "prometheus", "grafana"}
    assert (folder / services["server"]["build"]["context"]).resolve() == ROOT
    mounted = [volume.split(":")[0] for name in ("prometheus", "grafana") for volume in services[name]["volumes"]]
    assert not [path for path in mounted if not (folder / path).exists()]
    scraped = yaml.safe_load((folder / "prometheus.yaml").read_text())["scrape_configs"][0]["static_configs"][0]
    assert scraped["targets"] == ["server:80"]
    json.loads((ROOT / "assets" / "grafana.json").read_text())
    # Nobody else may ask without a key, and what is wrong for good is not tried for ever.
    assert all(re.match(r"(\$\{ADDRESS:-)?127\.0\.0\.1", port) for one in services.values() for port in one["ports"])
    assert services["server"]["restart"] == "on-failure:5"


def test_uninstall_removes_whatever_is_made_here(tmp_path: Path) -> None:
    """All that git ignores, but for a folder that nothing here writes to."""
    for name in ("Makefile", ".gitignore", "scripts/common.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    ignored = [line for line in (tmp_path / ".gitignore").read_text().splitlines() if line != "/logs/"]
    kernels = "server/text_generation_server/kernels/cpu/native/"
    made = [
        tmp_path / top / line.strip("/").replace("*", "name") / ("file" if line.endswith("/") else "")
        for line in ignored
        for top in ([""] if line.startswith("/") else [kernels] if line.startswith("lib") else ["server"])
    ]
    for path in made:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    kept = tmp_path / "quantized-model" / "config.json"
    kept.parent.mkdir()
    kept.write_text("{}")
    subprocess.run(["make", "uninstall"], cwd=tmp_path, check=True, capture_output=True, timeout=30)
    assert len(made) > 10 and not [path for path in made if path.exists()]
    assert kept.exists()


# Programs of a bare system, each a script that stands for it, and what is said of that system.
SYSTEMS = {
    "no compiler, no apt-get": ({}, "missing: build-essential. This system has no apt-get; install them by hand"),
    "no compiler, no root": (
        {"apt-get": "exit 0", "id": "echo 1000"},
        "missing: build-essential. Install them as root",
    ),
    "an old Python": (
        {"cc": "exit 0", "c++": "exit 0", "apt-get": "exit 0", "python3": "exit 1", "id": "echo 0"},
        "no Python 3.11, 3.12 or 3.13 with venv was found; name one with PYTHON=...",
    ),
    "an old cargo": (
        {"cc": "exit 0", "c++": "exit 0", "cargo": "echo cargo 1.60.0"},
        "cargo is 1.60.0, {wanted} or newer is needed. Install rustup, or remove the older cargo from PATH",
    ),
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_that_lacks_something_is_told_what(system: str, tmp_path: Path) -> None:
    """One message that begins with `error:`, and nothing half-installed."""
    programs, expected = SYSTEMS[system]
    for name in ("scripts/install.sh", "scripts/rust.sh", "scripts/common.sh", "rust-toolchain.toml"):
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "clone" / name)
    found = tmp_path / "bin"
    found.mkdir()
    for name in ("bash", "cut", "dirname", "env", "git", "head", "id", "make", "curl", "sed", "sort"):
        if name not in programs and (path := shutil.which(name)):
            (found / name).symlink_to(path)
    for name, script in ({"python3": "exit 0"} | programs).items():
        (found / name).write_text(f"#!/bin/sh\n{script}\n")
        (found / name).chmod(0o755)
    before = sorted((tmp_path / "clone").rglob("*"))
    environment = {"PATH": str(found), "HOME": str(tmp_path / "home")}
    command = [tmp_path / "clone" / "scripts" / "install.sh"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    wanted = re.search(r'^channel = "(.*)"', (ROOT / "rust-toolchain.toml").read_text(), re.MULTILINE)
    assert wanted is not None
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert done.returncode == 1 and errors == [f"install: error: {expected.format(wanted=wanted[1])}"], done
    assert sorted((tmp_path / "clone").rglob("*")) == before


def pythons() -> list[str]:
    """The environment's own, and others that are here: what Python tells of packages differs between its versions."""
    found = [str(BINARIES / "python")]
    for version in ("3.11", "3.12", "3.13"):
        program = shutil.which(f"python{version}")
        # What stands for a version may have none behind it.
        if program and subprocess.run([program, "-c", ""], capture_output=True, timeout=60).returncode == 0:
            found.append(program)
    return found


@pytest.mark.parametrize("python", pythons())
def test_a_package_that_is_there_in_part_is_installed_again(python: str, tmp_path: Path) -> None:
    """pip asks for the description of a package alone, which may be there without the package."""
    site, lock = tmp_path / "site-packages", tmp_path / "lock"
    lock.write_text("# versions\nsome-package==1.2\n")
    facts = site / "some_package-1.2.dist-info"
    facts.mkdir(parents=True)
    (site / "some_package.py").write_text("x = 1\n")
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: some-package\nVersion: 1.2\n")
    (facts / "RECORD").write_text("some_package.py,,6\nsome_package-1.2.dist-info/METADATA,,\n")

    def said() -> str:
        command = [python, ROOT / "scripts" / "broken_packages.py", lock]
        environment = {**os.environ, "PYTHONPATH": str(site)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout

    assert said() == ""
    (site / "some_package.py").write_text("x")
    assert said() == "some-package==1.2\n"
    (site / "some_package.py").unlink()
    assert said() == "some-package==1.2\n"
    (site / "some_package.py").write_text("x = 1\n")
    assert said() == ""
    (facts / "RECORD").unlink()
    assert said() == "some-package==1.2\n"
    (facts / "METADATA").unlink()
    lock.write_text("")
    assert said() == "some_package==1.2\n"
