"""What no tool checks: who may import whom, which words may stand where, and how long things are.

Each rule is a function from a file's place and source to complaints; each is also shown to be able to complain.
"""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "text_generation_server"
FILES = sorted(
    p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py") if "pb" not in p.relative_to(PACKAGE).parts
)
Rule = Callable[[str, str], list[str]]

# Who may import whom, architecture §3. A room is a folder or a module; everybody may import these.
EVERYBODY = {"errors", "faults", "health"}
MAY_IMPORT = {
    "cli": {
        "config", "logs", "service", "planning", "checkpoint.locate", "quantize", "version", "kernels.cuda.ahead",
        "kernels.cuda.compile", "kernels.cuda.libcuda",
    },
    "config": set(),
    "logs": {"config"},
    "errors": set(),
    "health": set(),
    "version": set(),
    "lifeline": set(),
    "stacks": set(),
    "faults": set(),
    "outbox": set(),
    "service": {"outbox", "config", "lifeline", "stacks", "pb", "shard", "runner", "planning", "sampling"},
    "shard": {
        "config", "runner", "ahead", "sequences", "batch", "distributed", "meeting", "loading", "planning", "models",
        "kernels", "sampling.grammar", "sampling.processors",
    },
    "runner": {"sequences", "batch", "sampling", "distributed", "kernels.interface"},
    "ahead": {"runner", "sequences", "sampling", "kernels.interface"},
    "sequences": {"sampling"},
    "batch": {"kernels.interface"},
    "sampling": {"sampling", "kernels.interface"},
    "planning": {"checkpoint", "kernels.select", "quantization", "loading"},
    "models": {
        "models", "layers", "batch", "loading", "planning", "checkpoint", "kernels.interface",
    },
    "layers": {"layers", "batch", "loading", "quantization.format", "kernels.interface", "checkpoint.model_config"},
    "quantization": {"quantization", "checkpoint", "kernels.weights", "kernels.codes"},
    # The offline quantizer is the serving machine turned round; nothing that serves knows it.
    "quantize": {
        "quantize", "models", "layers.linear", "quantization", "checkpoint", "planning", "loading", "kernels.interface",
        "kernels.offline", "kernels.columns",
    },
    "loading": {"checkpoint", "quantization.format", "quantization.read", "kernels.interface", "kernels.weights"},
    "distributed": {"shared_memory"},
    "meeting": set(),
    "shared_memory": set(),
    "checkpoint": {"checkpoint"},
    # Kernels know torch, and the batch that they read.
    "kernels": {"kernels", "batch"},
}  # fmt: skip


def room(file: str) -> str:
    return file.removesuffix(".py").split("/")[0]


def imports(file: str, tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(module inside the package with a dot between folders, name imported from it), for every import of our own."""
    here = file.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            words = (node.module or "").split(".") if node.module else []
            if node.level:
                words = here[: len(here) - node.level + 1] + words
            elif words[:1] == ["text_generation_server"]:
                words = words[1:]
            else:
                continue
            for alias in node.names:
                yield ".".join(words), alias.name


def direction(file: str, source: str) -> list[str]:
    """Imports go one way."""
    mine, complaints = room(file), []
    if mine in ("__init__", "__main__"):
        return []
    if mine not in MAY_IMPORT:
        return [f"{file}: a new room; say in MAY_IMPORT whom it may import"]
    for module, name in imports(file, ast.parse(source)):
        target = f"{module}.{name}".strip(".")
        allowed = MAY_IMPORT[mine] | EVERYBODY
        if not any(target == a or target.startswith(a + ".") for a in allowed) and target != "__version__":
            complaints.append(f"{file} imports {target}")
    return complaints


def strings_and_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Words of the code with their lines: names, attributes, strings; not docstrings."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def words(file: str, source: str, pattern: str) -> list[str]:
    found = [(line, text) for line, text in strings_and_names(ast.parse(source)) if re.search(pattern, text)]
    return [f"{file}:{line} says {text!r}" for line, text in found]


def devices(file: str, source: str) -> list[str]:
    """Only these rooms may name a device."""
    if room(file) in ("kernels", "kv_cache", "graphs", "distributed", "shared_memory", "config", "cli"):
        return []
    # What a default says for the kernels to check is not a decision.
    source = source.replace('device: str = "cpu"', "device: str")
    return words(file, source, r"^(cpu|cuda|is_cuda|xpu|mps|nccl|gloo)$|^cuda:\d")


def weight_formats(file: str, source: str) -> list[str]:
    """Models and layers know no weight format; formats know neither models nor ranks."""
    if room(file) in ("models", "layers"):
        return words(
            file, source, r"(?i)(gptq|awq|bitsandbytes|marlin|exl2|eetq|fp8|int8|nf4|dense|qweight|qzeros|g_idx)"
        )
    if room(file) == "quantization":
        return words(file, source, r"(?i)((?<!ex)llama|qwen|mistral|falcon|bloom|gemma|^rank$|world_size|tp_rank)")
    return []


def environment(file: str, source: str) -> list[str]:
    """Settings have one path: the argument parser."""
    return [] if room(file) in ("config", "cli") else words(file, source, r"^(environ|getenv|putenv)$")


def pickles(file: str, source: str) -> list[str]:
    """Nothing executable is read, from a disk or a wire."""
    tree, complaints = (
        ast.parse(source),
        words(file, source, r"^(pickle|cPickle|cloudpickle|dill|joblib|marshal|shelve)$"),
    )
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
        if re.search(r"\b(pickle|cloudpickle|dill|joblib|marshal|shelve)\b", " ".join([module, *names])):
            complaints.append(f"{file}:{node.lineno} imports {module} {names}")
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("torch.load", "np.load", "numpy.load", "eval", "exec") or "object_list" in called:
                complaints.append(f"{file}:{node.lineno} calls {called}")
    return complaints


def wire_types(file: str, source: str) -> list[str]:
    """Messages do not leave the service."""
    if file == "service.py":
        return []
    found = [target for target, name in imports(file, ast.parse(source)) if "pb" in (target, name)]
    return [f"{file} imports messages"] * bool(found) + words(file, source, r"_pb2$|^protobuf$")


def broad_excepts(file: str, source: str) -> list[str]:
    """Only the service answers for what nobody expected."""
    if file == "service.py":
        return []
    caught = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ExceptHandler)]
    broad = [n for n in caught if n.type is None or ast.unparse(n.type) in ("Exception", "BaseException")]
    return [f"{file}:{n.lineno} catches everything" for n in broad]


def docstring(file: str, source: str) -> list[str]:
    """A module says what it is for, in a sentence."""
    if not source.strip():
        return []
    text = ast.get_docstring(ast.parse(source)) or ""
    return [] if re.match(r"\w.*[.:]", text.split("\n\n")[0], re.DOTALL) else [f"{file} does not say what it is for"]


def sizes(file: str, source: str) -> list[str]:
    """A file can be read in one sitting, a function at a glance."""
    complaints = [f"{file} has {n} lines"] if (n := len(source.splitlines())) > 500 else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            # The flags of a command are a table, not code.
            length = (node.end_lineno or 0) - node.body[0].lineno + 1
            if length > 60:
                complaints.append(f"{file}:{node.lineno} {node.name} has {length} lines")
    return complaints


def leftovers(file: str, source: str) -> list[str]:
    """Nothing is left for later, and nobody's machine is written down."""
    pattern = r"\b(TO" r"DO|FIX" r"ME|XX" r"X|Not" r"ImplementedError)\b|/home/|/wo" r"rk/|/tmp/\w|set_var"
    return [
        f"{file}:{i} says {line.strip()!r}" for i, line in enumerate(source.splitlines(), 1) if re.search(pattern, line)
    ]


RULES: dict[str, tuple[Rule, list[tuple[str, str]]]] = {
    "imports go one way": (direction, [
        ("kernels/cpu/linear.py", "from ...models.llama import build"),
        ("sampling/sampler.py", "from ..runner import Runner"),
        ("layers/linear.py", "def f():\n    from ..service import run"),
        ("models/llama.py", "from text_generation_server.runner import Runner"),
        ("checkpoint/index.py", "from ..quantization.format import WeightFormat"),
        ("layers/attention.py", "from ..quantization.dense import Dense"),
        ("news.py", "import os"),
    ]),
    "only some rooms name a device": (devices, [
        ("models/llama.py", "x = torch.zeros(3, device='cuda')"),
        ("layers/linear.py", "if x.is_cuda: pass"),
        ("runner.py", "device = 'cpu'"),
        ("loading.py", "d = 'cuda:0'"),
        ("loading.py", "x = y.cpu()"),
    ]),
    "models know no weight format, formats no model": (weight_formats, [
        ("models/llama.py", "if quantize == 'gptq': pass"),
        ("layers/linear.py", "w = load['qweight']"),
        ("quantization/dense.py", "if model_type == 'llama': pass"),
        ("quantization/dense.py", "n = tp.rank"),
    ]),
    "settings have one path": (environment, [
        ("models/llama.py", "import os\nx = os.environ['X']"),
        ("shard.py", "import os\nx = os.getenv('X')"),
    ]),
    "no pickles": (pickles, [
        ("checkpoint/tensors.py", "x = torch.load('weights.bin')"),
        ("runner.py", "import pick" "le"),
        ("runner.py", "from pickle import loads"),
        ("distributed.py", "dist.broadcast_object_list([1])"),
        ("sampling/constraint.py", "eval('1')"),
    ]),
    "messages do not leave the service": (wire_types, [
        ("runner.py", "from .pb import shard_pb2 as pb"),
        ("shard.py", "from . import pb"),
    ]),
    "only the service catches everything": (broad_excepts, [
        ("runner.py", "try:\n    pass\nexcept Exception:\n    pass"),
        ("runner.py", "try:\n    pass\nexcept:\n    pass"),
    ]),
    "a module says what it is for": (docstring, [("runner.py", "import os"), ("runner.py", '"""todo"""')]),
    "files and functions are short": (sizes, [
        ("runner.py", "x = 1\n" * 501),
        ("runner.py", "def f():\n" + "    x = 1\n" * 61),
        ("runner.py", "class A:\n    def f(self):\n" + "        x = 1\n" * 61),
    ]),
    "nothing is left for later": (leftovers, [
        ("runner.py", "# TO" + "DO: later"),
        ("runner.py", "raise Not" + "ImplementedError"),
        ("runner.py", "x = '/home/me/model'"),
    ]),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_the_package_is_tidy(rule):
    check, _ = RULES[rule]
    assert [c for file in FILES for c in check(file, (PACKAGE / file).read_text())] == []


@pytest.mark.parametrize(("rule", "file", "source"), [(r, *case) for r, (_, cases) in RULES.items() for case in cases])
def test_a_rule_complains_of_what_it_forbids(rule, file, source):
    check, _ = RULES[rule]
    assert check(file, source)


@pytest.mark.parametrize(
    ("rule", "file", "source"),
    [
        ("imports go one way", "models/llama.py", "from ..layers.linear import Linear\nfrom torch import nn"),
        ("only some rooms name a device", "kernels/cpu/kernels.py", "device = torch.device('cpu')"),
        ("only some rooms name a device", "models/llama.py", '"""Not for cuda."""\nx = "cpus"'),
        ("settings have one path", "config.py", "import os\nx = os.environ['X']"),
        ("no pickles", "checkpoint/tensors.py", "with safe_open(path, 'pt') as file: file.get_slice('x')"),
        ("files and functions are short", "runner.py", "x = 1\n" * 500),
    ],
)
def test_a_rule_does_not_complain_of_what_it_allows(rule, file, source):
    check, _ = RULES[rule]
    assert check(file, source) == []


def test_all_files_are_looked_at():
    assert {"cli.py", "models/llama.py", "kernels/cpu/attention.py", "sampling/philox.py"} <= set(FILES)
