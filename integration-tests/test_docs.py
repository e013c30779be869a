"""What the README and the documentation tell people to type, typed; what they say of messages and files, looked up."""

import html
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import LLAMA, ROOT
from support.server import BINARIES, Server

PAGES = [ROOT / "README.md", ROOT / "benchmark" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text()
# Commands that a test cannot type, and what types them instead; the file is there and has the words.
ELSEWHERE = {
    r"make (install|test|wheel|docs)\b": (".ci/run", "make install"),
    r"make run\b": ("scripts/first_answer.sh", "make run"),
    r"sudo apt-get install": ("deploy/tests/fresh.sh", "packages of the README"),
    r"(python3 -m venv )?server-environment\b": ("deploy/tests/wheel.sh", "pip"),
    r"docker (build|run)\b": ("deploy/tests/image.sh", "buildah bud"),
    r"(\w+=\S+ )*docker compose": ("integration-tests/test_deploy.py", "compose"),
    r"pip install 'lm_eval|lm_eval run|python integration-tests/support/lm_eval_tasks.py": (
        "integration-tests/support/lm_eval_tasks.py",
        "lm-eval",
    ),
    r"python -m venv target/|target/[\w/]+/bin/pip install": ("benchmark/README.md", "environment of its own"),
}


@dataclass(frozen=True)
class Command:
    """A line that a reader is told to type."""

    page: str
    line: str

    def __str__(self) -> str:
        return f"{self.page}: {self.line}"


def commands() -> Iterator[Command]:
    """Every line of every block of shell, continued lines joined and comments dropped; and the curl lines of tables."""
    for path in PAGES:
        text, page = path.read_text(), str(path.relative_to(ROOT))
        for block in re.findall(r"```(?:sh|shell|bash)\n(.*?)```", text, re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip():
                    yield Command(page, re.sub(r"\s{2,}# .*", "", line).strip())
        for line in re.findall(r"`(curl [^`]*)`", text):
            yield Command(page, line)


COMMANDS = list(commands())


def kind(command: Command) -> str:
    """Which of the tests below types it."""
    if any(re.match(pattern, command.line) for pattern in ELSEWHERE):
        return "elsewhere"
    program = Path(shlex.split(command.line)[0]).name
    if program == "python" and "benchmark/" in command.line:
        return "benchmark"
    return program


def of(*kinds: str) -> list[Command]:
    return [command for command in COMMANDS if kind(command) in kinds]


def test_every_command_of_the_documentation_is_typed_by_a_test() -> None:
    served = {"curl", "text-generation-launcher", "text-generation-server", "text-generation-benchmark", "benchmark"}
    unknown = [str(command) for command in COMMANDS if kind(command) not in served | {"elsewhere"}]
    assert not unknown, f"no test types {unknown}"
    assert len(of("curl")) >= 8 and any("--unix-socket" in command.line for command in of("curl"))
    assert len(of("text-generation-launcher")) >= 8


@pytest.mark.parametrize("pattern", ELSEWHERE)
def test_what_types_the_others_is_there(pattern: str) -> None:
    path, words = ELSEWHERE[pattern]
    assert words in (ROOT / path).read_text(), path


@pytest.mark.parametrize("command", of("curl"), ids=str)
def test_a_curl_line_works(llama: Server, command: Command) -> None:
    words = shlex.split(command.line.replace(":3000/", f":{llama.port}/"))
    words = [word.replace("RUN_DIRECTORY", str(llama.run_directory())) for word in words]
    done = subprocess.run([*words, "-sS", "--fail"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    if "/metrics" in command.line:
        assert "tgi_request_count" in done.stdout
        return
    answers = [line.removeprefix("data: ") for line in done.stdout.splitlines() if line.strip()]
    assert answers, "no answer"
    assert all(answer == "[DONE]" or isinstance(json.loads(answer), dict) for answer in answers), done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where what a reader makes is made, for the commands after it."""
    return tmp_path_factory.mktemp("documentation")


@pytest.fixture(scope="module")
def typed() -> set[tuple[str, ...]]:
    """What has been typed already, and worked: pages say some things twice."""
    return set()


def local(command: Command, folder: Path) -> list[str]:
    """The words, with names that stand for the reader's own made into real ones."""
    made, model = str(folder / "made"), str(LLAMA.relative_to(ROOT))
    names = {"path/or/hub-id": model, "path/to/model": model, "path/of/result": made, "quantized-model": made}
    return [names.get(word, word) for word in shlex.split(command.line)]


@pytest.mark.parametrize(
    "command", of("text-generation-launcher", "text-generation-server", "text-generation-benchmark"), ids=str
)
def test_a_command_works(llama: Server, command: Command, folder: Path, typed: set[tuple[str, ...]]) -> None:
    program, *words = local(command, folder)
    name = Path(program).name
    if name == "text-generation-launcher" and "--model-id" in words:
        place = words.index("--model-id")
        model = words.pop(place + 1)
        words.pop(place)
        if "--port" in words:
            del words[words.index("--port") : words.index("--port") + 2]
        if (name, model, *words) in typed:
            return
        with Server(ROOT / model, *words) as server:
            assert server.generate("In the beginning", max_new_tokens=4)["details"]["generated_tokens"] == 4
        typed.add((name, model, *words))
        return
    if "quantize" in words:
        # The first of them makes what the launchers after it serve; fewer samples than a page says serve as well.
        if "--num-samples" in words:
            del words[words.index("--num-samples") : words.index("--num-samples") + 2]
        if (name, *words) in typed:
            return
        typed.add((name, *words))
        words += ["--num-samples", "4", "--sequence-length", "128", "--overwrite"]
    if name == "text-generation-benchmark":
        words = [f"127.0.0.1:{llama.port}" if word.startswith("127.0.0.1:") else word for word in words]
        words[words.index("--requests") + 1] = "64"
    done = subprocess.run([BINARIES / name, *words], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout


@pytest.mark.parametrize("script", sorted({command.line.split()[1] for command in of("benchmark")}))
def test_a_measurement_says_what_it_does(script: str) -> None:
    command = [BINARIES / "python", script, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


def python_parts() -> list[tuple[str, str]]:
    """Each part of the blocks of Python, and the package that it needs."""
    parts = []
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL):
        for part in block.strip().split("\n\n"):
            if (package := re.match(r"from (\w+) import", part)) is not None:
                parts.append((package[1], part))
    return parts


@pytest.mark.parametrize(("package", "part"), python_parts(), ids=[package for package, _ in python_parts()])
def test_an_example_of_a_client_works(llama: Server, package: str, part: str) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed beside the server")
    program = part.replace("127.0.0.1:3000", f"127.0.0.1:{llama.port}")
    done = subprocess.run(
        [BINARIES / "python", "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("path", re.findall(r"`(?:GET )?(/[a-z_]+)`", README))
def test_a_route_of_the_readme_is_there(llama: Server, path: str) -> None:
    assert llama.get(path)[0] in (200, 405), path


def recorded() -> str:
    """What the recording shows, line by line."""
    picture = (ROOT / "docs" / "first-answer.svg").read_text()
    lines = re.findall(r'^ *(?:</text>)?<text class="terminal-\d+-r\d.*$', picture, re.MULTILINE)
    return "\n".join(html.unescape(re.sub("<[^>]+>", "", line.strip())).replace("\xa0", " ").rstrip() for line in lines)


def test_the_recording_shows_what_the_readme_and_the_programs_say() -> None:
    shown = recorded()
    assert shown.startswith("$ make run\n") and shown.endswith("\nServing until Ctrl-C.") and "\nmake run " in README
    (curl,) = re.findall(r"^ *(curl (?:.*\\\n)*.*)$", shown, re.MULTILINE)
    typed = [shlex.split(line) for line in re.findall(r"^(curl (?:.*\\\n)*.*)$", README, re.MULTILINE)]
    assert shlex.split(curl) in typed, curl
    said = (ROOT / "scripts" / "run.py").read_text() + (ROOT / "scripts" / "install.sh").read_text() + sources()
    for words in (
        "Try it yourself:",
        "Serving until Ctrl-C.",
        "Connected: ready at",
        "ready: .venv/bin/text-generation",
    ):
        assert words in shown and words in said, words
    version = tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]["package"]["version"]
    assert f"text-generation-launcher {version} (" in shown


def sources() -> str:
    """All code, with texts that are cut over lines joined."""
    paths = [path for top in ("launcher/src", "router/src") for path in (ROOT / top).rglob("*.rs")]
    paths += (ROOT / "server" / "text_generation_server").rglob("*.py")
    text = "\n".join(path.read_text() for path in paths)
    return re.sub(r"\"\s*\n\s*f?\"|\\\n\s*", "", text)


def test_the_messages_of_troubleshooting_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+)`", page, re.MULTILINE)
    code = sources()
    assert len(messages) >= 20
    assert not [message for message in messages if message not in code]


def test_files_that_the_documentation_names_are_there() -> None:
    gone = []
    for path in PAGES:
        for name in re.findall(
            r"`((?:integration-tests|server|router|launcher|benchmark|assets|deploy|docs|scripts)/[\w./-]+)`",
            path.read_text(),
        ):
            if not (ROOT / name).exists():
                gone.append(f"{path.name}: {name}")
    assert not gone


def slugs(path: Path) -> set[str]:
    """What a page's headings are called in addresses."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def links() -> list[tuple[Path, str]]:
    """Every link of every page to another of this repository."""
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    pages = [ROOT / line for line in listed.splitlines()]
    return [
        (page, target)
        for page in pages
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text())
        if not re.match(r"[a-z]+:", target)
    ]


def test_no_link_leads_nowhere() -> None:
    found = links()
    assert len(found) >= 20
    broken = []
    for page, target in found:
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        if not path.exists() or (anchor and anchor not in slugs(path)):
            broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken


def test_every_row_of_hostile_input_has_tests_that_are_there() -> None:
    page = (ROOT / "docs" / "hostile-input.md").read_text()
    rows: list[int] = []
    for numbers, tests in re.findall(r"^\| ([\d, –]+) \|.*\| ([^|]+) \|$", page, re.MULTILINE):
        for part in numbers.split(", "):
            first, _, last = part.partition("–")
            rows += range(int(first), int(last or first) + 1)
        named = re.findall(r"`([\w./-]+\.(?:rs|py))`: ((?:`\w+`(?:, )?)+)", tests)
        assert named, tests
        for file, names in named:
            code = (ROOT / file).read_text()
            for name in re.findall(r"\w+", names):
                assert re.search(rf"\b(?:def|fn) {name}\(", code), f"{file} has no {name}"
    assert sorted(rows) == list(range(1, 68))
