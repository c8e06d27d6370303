"""The house plan as a test: who may import whom, and what has no place here. The checks run on parsed sources and import nothing."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The units of minllm, from the ground up. A unit may import what stands on an earlier line, and its neighbours without a circle.
TIERS = [
    ("config", "spec", "hlo", "chips", "parallel.schedule"),
    ("sharding", "weights"),
    ("layer",),
    ("parallel", "parallel.ring", "parallel.vocab", "parallel.hosts", "parallel.data", "parallel.expert"),
    ("layers",),
    ("models",),
    ("objectives", "lora", "quant", "optim", "sample", "interop"),
    ("parallel.pipeline",),
    ("run", "estimate", "xla_flags"),
    ("step",),
]
TIER = {unit: tier for tier, units in enumerate(TIERS) for unit in units}
ENTRY_POINTS = {"train", "plan", "generate", "serve.server", "course"}       # import anything of minllm but the public face
# These say all they may import instead: they know nothing of layers and models.
LEAVES = {"config", "spec", "sharding", "weights", "data", "checkpoint", "metrics"}
ONLY = {
    "config": set(),
    "data": LEAVES,
    "checkpoint": LEAVES,
    "metrics": LEAVES,
    "pretrained": {*TIER, "data", "checkpoint"} - {"run", "step"},
    "serve": {*TIER, "data", "checkpoint", "metrics", "serve"} - {"run", "step"},
}
ABOVE_DATA = TIER["objectives"]                 # from here up, data, checkpoint and metrics may be imported too
PRETRAINED_BY = {"train", "generate", "serve.server", "course"}
TORCH_IN = re.compile(r"minllm/interop/torch\.py|scripts/bench_\w+\.py|tests/.*")      # a benchmark against PyTorch needs PyTorch
KERNELS_MAY = {"minllm_kernels", "jax", "jaxlib", "numpy", "jaxtyping"}
TRITON_IN = re.compile(r"(triton|gpu)\w*\.py")
HOMELESS = {"util", "utils", "common", "base", "helper", "helpers", "misc"}


class Import(NamedTuple):
    module: str         # absolute dotted name of what is imported
    line: int
    typing_only: bool   # under `if TYPE_CHECKING:`: a name for the reader, no dependency


def module_name(path: str) -> str:
    parts = Path(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, path: str) -> Iterator[Import]:
    """Every import of a file, function-local ones included. `from a import b` gives a.b: b may be a module."""
    package = module_name(path).split(".") if path.endswith("__init__.py") else module_name(path).split(".")[:-1]

    def visit(node: ast.AST, typing_only: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1], *filter(None, [node.module])] if node.level else [node.module or ""]
            yield from (Import(".".join([*base, alias.name]), node.lineno, typing_only) for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.body:
                yield from visit(child, True)
            for child in node.orelse:
                yield from visit(child, typing_only)
        else:
            for child in ast.iter_child_nodes(node):
                yield from visit(child, typing_only)

    yield from visit(ast.parse(source), False)


def unit_of(module: str) -> str | None:
    """minllm.layers.attention.Attention -> layers; minllm -> "" (the public face); jax -> None."""
    parts = module.split(".")
    if parts[0] != "minllm":
        return None
    if parts[1:3] == ["serve", "server"]:
        return "serve.server"
    if parts[1:2] == ["parallel"]:                  # each file stands alone: some are called by layers, others hold whole models
        return ".".join(parts[1:3])
    return parts[1] if len(parts) > 1 else ""


def units(paths: list[str]) -> set[str]:
    """The units that exist: `from minllm import spec` is the module, `from minllm import init` the public face."""
    return {unit for path in paths if (unit := unit_of(module_name(path)))}


def import_faults(path: str, source: str, known: set[str]) -> list[str]:
    faults = []
    in_kernels = path.startswith("kernels/minllm_kernels/")
    here = unit_of(module_name(path)) if path.startswith("minllm/") else None
    for name, line, typing_only in imports(source, path):
        top = name.split(".")[0]
        at = f"{path}:{line}: "
        if top == "torch" and not TORCH_IN.fullmatch(path):
            faults.append(f"{at}imports torch; only minllm/interop/torch.py, scripts/bench_*.py and tests may")
        if in_kernels:
            allowed = top in KERNELS_MAY or top in sys.stdlib_module_names
            if not allowed and not (top in ("triton", "jax_triton") and TRITON_IN.fullmatch(Path(path).name)):
                faults.append(f"{at}imports {top}; minllm_kernels depends on jax alone")
        if here is None or top != "minllm" or typing_only:
            continue
        there = unit_of(name) or ""
        if there not in known:
            there = ""                      # a name of the public face, not a module
        if there == here or here == "":
            continue
        if there == "":
            faults.append(f"{at}imports the public face minllm; import the module that owns the name")
        elif there in ENTRY_POINTS and not (here == "course" or (here, there) == ("serve", "serve.server")):
            faults.append(f"{at}{here} imports the entry point {there}")
        elif there == "pretrained" and here not in PRETRAINED_BY:
            faults.append(f"{at}{here} imports pretrained; only {', '.join(sorted(PRETRAINED_BY))} and scripts may")
        elif here in ENTRY_POINTS:
            continue
        elif here in ONLY:
            if there not in ONLY[here]:
                faults.append(f"{at}{here} may not import {there}")
        elif here not in TIER:
            faults.append(f"{at}{here} has no place in TIERS of tests/test_structure.py: say who may import it, and whom it may")
        elif there in TIER:
            if TIER[there] > TIER[here]:
                faults.append(f"{at}{here} imports {there}, which stands above it")
        elif not (there in ("data", "checkpoint", "metrics") and TIER[here] >= ABOVE_DATA):
            faults.append(f"{at}{here} may not import {there}")
    return faults


def circles(sources: dict[str, str], known: set[str]) -> list[str]:
    """Circles between units. Inside a package the interpreter finds them itself."""
    edges: dict[str, set[str]] = {unit: set() for unit in known}
    for path, source in sources.items():
        if path.startswith("minllm/") and (here := unit_of(module_name(path))):
            edges[here] |= {u for i in imports(source, path) if not i.typing_only and (u := unit_of(i.module)) in known and u != here}
    found, done = [], set()

    def walk(unit: str, trail: list[str]) -> None:
        if unit in trail:
            found.append(" -> ".join([*trail[trail.index(unit):], unit]))
        elif unit not in done:
            for other in sorted(edges[unit]):
                walk(other, [*trail, unit])
            done.add(unit)

    for unit in sorted(known):
        walk(unit, [])
    return found


def style_faults(path: str, source: str) -> list[str]:
    faults = []
    tree = ast.parse(source)
    product = path.startswith(("minllm/", "kernels/minllm_kernels/"))
    here = unit_of(module_name(path)) if path.startswith("minllm/") else None
    if homeless := HOMELESS & {part.removesuffix(".py") for part in Path(path).parts}:
        faults.append(f"{path}: a file is named after its idea, not {', '.join(homeless)}")
    if product and not Path(path).name.startswith("_") and not ast.get_docstring(tree):
        faults.append(f"{path}: a public module opens with a docstring: the idea, the formula, the paper")
    if product and Path(path).name == "__init__.py" and tree.body and not ast.get_docstring(tree):
        faults.append(f"{path}: a package opens with a docstring")
    for node in ast.walk(tree):
        at = f"{path}:{getattr(node, 'lineno', 0)}: "
        if isinstance(node, ast.Raise) and node.exc is not None:
            bare = isinstance(node.exc, ast.Name) or (isinstance(node.exc, ast.Call) and not node.exc.args)
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if bare and isinstance(raised, ast.Name) and raised.id == "NotImplementedError":
                faults.append(f"{at}NotImplementedError without a message: say what is missing and what to do instead")
        if product and here not in ENTRY_POINTS and reads_environment(node):
            faults.append(f"{at}reads the environment; only entry points do: {', '.join(sorted(ENTRY_POINTS))}, scripts")
        if path.startswith("minllm/") and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and node.args.kwarg:
            passed = [
                call for call in ast.walk(node) if isinstance(call, ast.Call)
                for word in call.keywords
                if word.arg is None and isinstance(word.value, ast.Name) and word.value.id == node.args.kwarg.arg
            ]
            if passed:
                faults.append(f"{at}passes **{node.args.kwarg.arg} through; name the arguments")
    return faults


def reads_environment(node: ast.AST) -> bool:
    names = {"environ", "environb", "getenv", "getenvb"}
    if isinstance(node, ast.ImportFrom):
        return node.module == "os" and any(alias.name in names for alias in node.names)
    return isinstance(node, ast.Attribute) and node.attr in names and isinstance(node.value, ast.Name) and node.value.id == "os"


def tree_paths(readme: str) -> list[str]:
    """The paths in the first code block under the README's heading about the tree: the first word of a line, inside the folder above it
    that is indented less. Lines whose first word is no path (no slash, no suffix) go on with a description."""
    section = re.search(r"^#+ [^\n]*\btree\b[^\n]*\n.*?^```\w*\n(.*?)^```", readme, re.M | re.S | re.I)
    if not section:
        return []
    paths, folders = [], []
    for line in section[1].splitlines():
        line = re.sub("[│├└─]", " ", line)
        for word in line.split("#")[0].split()[:1]:
            indent = len(line) - len(line.lstrip())
            folders = [(depth, folder) for depth, folder in folders if depth < indent]
            if not re.fullmatch(r"[\w.\-/]+(/|\.\w+)|[A-Z]{4,}|\.ci/run|scripts/run|run", word):
                continue
            paths.append("".join(folder for _, folder in folders) + word)
            if word.endswith("/"):
                folders.append((indent, word))
    return paths


# --- the repository ---------------------------------------------------------------------------------------------------------------

SOURCES = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for folder in ("minllm", "kernels", "scripts", "tests") for path in sorted((ROOT / folder).rglob("*.py"))
}
UNITS = units([path for path in SOURCES if path.startswith("minllm/")])


def test_imports_follow_the_plan():
    faults = [fault for path, source in SOURCES.items() for fault in import_faults(path, source, UNITS)]
    assert not faults, "\n".join(faults)


def test_no_import_circles():
    assert not circles(SOURCES, UNITS)


def test_style_of_the_house():
    faults = [fault for path, source in SOURCES.items() for fault in style_faults(path, source)]
    assert not faults, "\n".join(faults)


def test_tests_mirror_the_tree():
    packages = {path.split("/")[1] for path in SOURCES if re.fullmatch(r"minllm/\w+/.+", path)}
    folders = {path.split("/")[1] for path in SOURCES if re.fullmatch(r"tests/.+/test_\w+\.py", path)}
    strangers = folders - packages - {"laws", "kernels", "train"}
    assert not strangers, f"tests/ has folders that are no package of minllm: {strangers}"
    untested = packages - folders - {"parallel"}        # a parallelism is tested by the laws
    assert not untested, f"packages of minllm without tests/<package>/test_*.py: {untested}"


def test_readme_names_what_exists():
    paths = tree_paths((ROOT / "README.md").read_text("utf-8"))
    assert paths, "README.md has no heading with the word 'tree' followed by a code block"
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing, f"the tree in README.md names what does not exist: {missing}"


# --- the checker itself -----------------------------------------------------------------------------------------------------------

ALL = {unit for tier in TIERS for unit in tier} | ENTRY_POINTS | {"serve", "pretrained", "data", "checkpoint", "metrics"}


@pytest.mark.parametrize(("path", "source"), [
    ("minllm/layers/attention.py", "from minllm.models import llama"),                      # upwards
    ("minllm/layers/attention.py", "def f():\n    import minllm.step"),                     # hidden in a function
    ("minllm/layers/attention.py", "from ..models.llama import llama3"),                    # relative
    ("minllm/layers/attention.py", "from .. import models"),
    ("minllm/layers/attention.py", "from minllm import apply"),                             # the public face
    ("minllm/data/packing.py", "from minllm.layer import Context"),
    ("minllm/checkpoint.py", "from minllm import models"),
    ("minllm/config.py", "from minllm import spec"),
    ("minllm/step.py", "from minllm.pretrained import load"),
    ("minllm/plan.py", "from minllm.pretrained import load"),
    ("minllm/layer.py", "from minllm.data import loader"),
    ("minllm/models/llama.py", "from minllm.sample import sample"),
    ("minllm/sample.py", "from minllm.serve import engine"),
    ("minllm/step.py", "from minllm.train import main"),
    ("minllm/interop/hf.py", "import torch.nn"),
    ("minllm/optim.py", "if TYPE_CHECKING:\n    import torch"),
    ("scripts/convert.py", "import torch"),
    ("minllm/novelty.py", "from minllm.spec import Spec"),                                  # a unit without a place
    ("kernels/minllm_kernels/ops/attention/reference.py", "from minllm.spec import Spec"),
    ("kernels/minllm_kernels/mask.py", "import flax"),
    ("kernels/minllm_kernels/mask.py", "import triton"),
])
def test_a_forbidden_import_is_caught(path, source):
    assert import_faults(path, source, ALL)


@pytest.mark.parametrize(("path", "source"), [
    ("minllm/layers/attention.py", "import math\nfrom minllm.layer import Out\nfrom minllm_kernels import attention\nfrom . import kv"),
    ("minllm/sharding.py", "if TYPE_CHECKING:\n    from minllm.layer import Execution"),
    ("minllm/run.py", "from minllm import optim, objectives\nfrom minllm.data import loader\nfrom minllm.models import FAMILIES"),
    ("minllm/step.py", "from minllm.run import Run\nfrom minllm.checkpoint import save"),
    ("minllm/train.py", "from minllm import pretrained, step\nfrom minllm.metrics import Console"),
    ("minllm/serve/server.py", "from minllm.pretrained import load\nfrom minllm.serve.engine import Engine"),
    ("minllm/__init__.py", "from minllm.sample import sample\nfrom minllm.layer import Context"),
    ("minllm/interop/torch.py", "import torch"),
    ("scripts/bench_train.py", "import torch\nfrom minllm.pretrained import load"),
    ("kernels/minllm_kernels/ops/attention/triton.py", "import triton\nimport jax_triton as jt\nfrom jax.experimental import pallas"),
    ("minllm/data/loader.py", "from minllm.config import config\nfrom minllm.data import sources"),
])
def test_an_allowed_import_passes(path, source):
    assert import_faults(path, source, ALL) == []


def test_a_circle_is_caught():
    there_and_back = {"minllm/lora.py": "from minllm import quant", "minllm/quant.py": "from minllm.lora import LoRA"}
    assert circles(there_and_back, ALL) == ["lora -> quant -> lora"]
    assert circles({"minllm/lora.py": "from minllm import quant", "minllm/quant.py": "import jax"}, ALL) == []


@pytest.mark.parametrize(("path", "source"), [
    ("minllm/layers/utils.py", '"""A."""'),
    ("tests/common/test_a.py", ""),
    ("minllm/optim.py", "x = 1"),
    ("minllm/layers/__init__.py", "from minllm.layers.attention import Attention"),
    ("scripts/prepare_data.py", "raise NotImplementedError"),
    ("scripts/prepare_data.py", "raise NotImplementedError()"),
    ("minllm/optim.py", '"""A."""\nimport os\nx = os.environ["HOME"]'),
    ("minllm/optim.py", '"""A."""\nfrom os import getenv'),
    ("kernels/minllm_kernels/mask.py", '"""A."""\nimport os\nx = os.getenv("HOME")'),
    ("minllm/optim.py", '"""A."""\ndef f(**options):\n    return g(1, **options)'),
    ("minllm/optim.py", '"""A."""\nf = lambda **options: g(**options)'),
])
def test_a_fault_of_style_is_caught(path, source):
    assert style_faults(path, source)


@pytest.mark.parametrize(("path", "source"), [
    ("minllm/optim.py", '"""A."""\nraise NotImplementedError("sharded Muon: use optimizer.kind=adamw")'),
    ("minllm/train.py", '"""A."""\nimport os\nx = os.environ["HOME"]'),
    ("minllm/serve/server.py", '"""A."""\nimport os\nx = os.environ["HOME"]'),
    ("minllm/optim.py", '"""A."""\ndef f(**names):\n    return dict(names)\n\ndef g(x, y):\n    return h(**x)'),
    ("minllm/layers/__init__.py", '"""A."""'),
])
def test_good_style_passes(path, source):
    assert style_faults(path, source) == []


README = """# minllm

## The tree

Words.

```
LICENSE
minllm/
  spec.py      Spec: one array
               declared once
  layers/      all of them
    attention.py
  x.y
kernels/minllm_kernels/
  mask.py  masks
```
"""


def test_the_tree_of_a_readme_is_read():
    assert tree_paths(README) == [
        "LICENSE", "minllm/", "minllm/spec.py", "minllm/layers/", "minllm/layers/attention.py", "minllm/x.y",
        "kernels/minllm_kernels/", "kernels/minllm_kernels/mask.py",
    ]
    assert tree_paths(README.replace("tree", "house")) == []
