"""The layers of docs/architecture.md, and what holds for every source file, read with `ast`.

A rule is a function from (path, source) to the faults it finds, so that made-up sources can show
that it finds them.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path.relative_to(REPO).as_posix()
    for folder in ("jaxreward", "configs", "launch")
    for path in (REPO / folder).rglob("*.py")
)

_LOW = {"core", "parallel", "models", "objectives", "rewards", "data"}
_MIDDLE = _LOW | {"diffusion", "sampling"}
# What a layer may import of ours beside itself. "x.y" is the one module y of layer x.
OURS = {
    "core": set(),
    "parallel": {"core"},
    "models": {"core", "parallel"},
    "objectives": {"core"},
    "rewards": {"core"},
    "data": {"rewards"},
    "diffusion": {"core", "objectives"},
    "sampling": {"core", "parallel", "models", "diffusion"},
    "train": _MIDDLE,
    "hub": _MIDDLE,
    "agents": _MIDDLE,
    "report": _MIDDLE,
    "evals": _MIDDLE | {"train.checkpoint"},
    "recipes": _MIDDLE
    | {"train", "hub", "agents", "report", "evals", "presets", "overrides", "testing"},
    "presets": _LOW | {"overrides", "fragments"},
    "fragments": set(),
    "overrides": {"core"},
    "testing": _LOW,
    "configs": {"presets"},
}
ABOVE = {"cli", "__main__", "__init__", "launch"}  # may import anything
LAZILY = {"hub": {"testing"}}  # inside functions only
CHAINS = {"recipes/staged.py", "recipes/self_evolve.py"}  # recipes that run other recipes
# What a recipe is made of, beside itself; the last is how anything is scored by a reward model.
PARTS = {
    "recipes/online_rl.py": {"credit", "rounds", "evaluate"},
    "recipes/rounds.py": {"credit"},
    "recipes/sft.py": {"denoisers"},
    "recipes/evaluate.py": {"denoisers"},
    "recipes/steps.py": {"credit"},
    "recipes/suites.py": {"evaluate", "generate"},
    "recipes/hypotheses.py": {"evaluate"},
    "recipes/likelihood.py": {"denoisers", "evaluate"},
    "recipes/probing.py": {"evaluate"},
    "recipes/diffusion_rl.py": {"credit", "denoisers", "evaluate", "online_rl", "steps"},
}

# Third-party packages: the only ones a layer may import, or those it may not import even lazily.
ONLY = {
    "core": {"jax", "numpy", "flax", "jaxtyping"},
    "parallel": {"jax", "numpy", "flax", "jaxtyping"},
    "objectives": {"jax", "numpy", "jaxtyping"},
    "configs": {"ml_collections"},
}
NEVER = {
    "models": {"transformers", "tokenizers", "torch", "grain"},
    "rewards": {"transformers", "tokenizers", "torch"},
    "data": {"jax", "jaxlib", "flax", "optax", "orbax", "torch"},
    "report": {"transformers", "torch"},
}
HEAVY = {  # loaded inside functions, so that `import jaxreward.anything` stays fast
    "transformers",
    "tokenizers",
    "orbax",
    "grain",
    "tensorflow_datasets",
    "torch",
    "matplotlib",
    "gguf",
    "reasoning_gym",
    "math_verify",
    "sympy",
    "tensorboardX",
    "wandb",
}
DYNAMIC = {"jaxreward/__init__.py", "jaxreward/core/resolve.py"}  # import by a computed name
NAMELESS = {"util", "utils", "helper", "helpers", "misc", "common"}


def layer_of(path):
    """The layer of a file: the folder below jaxreward, the module there, "configs", "launch"."""
    parts = Path(path).with_suffix("").parts
    return parts[1] if parts[0] == "jaxreward" else parts[0]


def imports(path, source):
    """(dotted name, line, at import time) of every import; relative ones are made absolute."""
    package = list(Path(path).parts[:-1])

    def walk(node, top):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, child.lineno, top
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                base = ".".join([*base, *([child.module] if child.module else [])])
                for alias in child.names:
                    yield f"{base}.{alias.name}", child.lineno, top
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, top and not inside)

    yield from walk(ast.parse(source), True)


def layer_faults(path, source):
    """Imports that the table of layers forbids."""
    me = layer_of(path)
    if me not in OURS and me not in ABOVE:
        return [f"{path}: {me!r} is no layer of tests/test_imports.py; place it there"]
    faults = []
    for name, line, top in imports(path, source):
        root, *rest = name.split(".")
        where = f"{path}:{line}: "
        if top and root in HEAVY and me != "launch":
            faults.append(f"{where}{root} at import time; import it inside the function")
        if root != "jaxreward":
            if root in NEVER.get(me, ()):
                faults.append(f"{where}{me} never imports {root}")
            if me in ONLY and root not in ONLY[me] | sys.stdlib_module_names:
                faults.append(f"{where}{me} imports only {', '.join(sorted(ONLY[me]))}, not {root}")
            if me == "core" and root == "flax" and rest[:1] != ["struct"]:
                faults.append(f"{where}core imports only flax.struct of flax")
            if me == "configs" and root in sys.stdlib_module_names:
                faults.append(f"{where}a config imports only ml_collections and presets")
            continue
        if me in ABOVE:
            continue
        if not rest or rest[0] == "*":
            # Submodules load on first use, so this name would reach every layer.
            faults.append(f"{where}import the module that is meant, not all of jaxreward")
            continue
        if rest[0] == "__version__":
            continue
        allowed = OURS[me] | (set() if top else LAZILY.get(me, set()))
        if me == rest[0]:
            mine = Path(path).relative_to("jaxreward").as_posix()
            parts = PARTS.get(mine, set())
            if me == "recipes" and mine not in CHAINS and not parts & set(rest):
                faults.append(f"{where}recipes do not import each other ({name})")
        elif rest[0] not in allowed and ".".join(rest[:2]) not in allowed:
            faults.append(f"{where}{me} may not import {name}")
    return faults


def dynamic_faults(path, source):
    """Imports by a computed name, through which any layer could be reached."""
    if path in DYNAMIC or layer_of(path) == "launch":
        return []
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    names = [(getattr(c.func, "attr", getattr(c.func, "id", "")), c.lineno) for c in calls]
    return [
        f"{path}:{line}: {name} hides an import"
        for name, line in names
        if name in ("import_module", "__import__")
    ]


def docstring_faults(path, source):
    """Public modules, classes, functions and methods without a docstring."""
    tree = ast.parse(source)
    faults = [] if ast.get_docstring(tree) else [f"{path}: no docstring"]

    def walk(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                if child.name.startswith("_"):
                    continue
                if not ast.get_docstring(child):
                    faults.append(f"{path}:{child.lineno}: {prefix}{child.name} has no docstring")
                if isinstance(child, ast.ClassDef):
                    walk(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.If | ast.Try | ast.With | ast.ExceptHandler):
                walk(child, prefix)

    walk(tree, "")
    return faults


def shape_faults(path, source):
    """Files that are too long, and names that say nothing about what is in them."""
    faults = []
    lines = len(source.splitlines())
    if lines > 600:
        faults.append(f"{path}: {lines} lines; at most 600, split it by concern")
    for part in Path(path).with_suffix("").parts:
        if NAMELESS & set(part.split("_")):
            faults.append(f"{path}: name the concern, not {part!r}")
    return faults


RULES = (layer_faults, dynamic_faults, docstring_faults, shape_faults)


@pytest.mark.parametrize("rule", RULES)
def test_every_source_obeys(rule):
    """Catches an import against the layers, an undocumented name, a file grown too long."""
    faults = [
        fault for path in SOURCES for fault in rule(path, (REPO / path).read_text(encoding="utf-8"))
    ]
    assert not faults, "\n".join(faults)


def test_sources_are_found():
    """Catches a moved folder, after which the test above would read nothing."""
    assert len(SOURCES) > 40
    assert {layer_of(path) for path in SOURCES} >= {"core", "models", "data", "recipes", "configs"}


FORBIDDEN = [
    ("core/x.py", "from jaxreward.parallel import mesh", "core may not import jaxreward.parallel"),
    ("core/x.py", "import optax", "core imports only"),
    ("core/x.py", "from flax import linen", "only flax.struct"),
    ("core/x.py", "import flax.linen", "only flax.struct"),
    ("parallel/x.py", "from jaxreward.models import decoder", "parallel may not import"),
    ("parallel/x.py", "def f():\n  import jaxreward.models.decoder as d", "parallel may not"),
    ("models/x.py", "from jaxreward.data import pipeline", "models may not import"),
    ("models/x.py", "from jaxreward.objectives.preference import bradley_terry", "models may not"),
    ("models/x.py", "from ..train import step", "models may not import jaxreward.train.step"),
    ("models/x.py", "from .. import train", "models may not import jaxreward.train"),
    ("models/x.py", "def f():\n  import transformers", "models never imports transformers"),
    ("objectives/x.py", "from jaxreward.models import heads", "objectives may not import"),
    ("objectives/x.py", "from jaxreward.rewards import verdict", "objectives may not import"),
    ("rewards/x.py", "from jaxreward.parallel import rules", "rewards may not import"),
    ("rewards/x.py", "def f():\n  import tokenizers", "rewards never imports tokenizers"),
    ("data/x.py", "import jax.numpy as jnp", "data never imports jax"),
    ("data/corpora/x.py", "def f():\n  from jax import numpy", "data never imports jax"),
    ("data/x.py", "from jaxreward.core import types", "data may not import jaxreward.core"),
    ("data/x.py", "from jaxreward.train import loop", "data may not import"),
    ("sampling/x.py", "from jaxreward.data import tokenize", "sampling may not import"),
    ("sampling/x.py", "from jaxreward.objectives import preference", "sampling may not import"),
    ("train/x.py", "from jaxreward.hub import load", "train may not import"),
    ("hub/x.py", "from jaxreward.train import state", "hub may not import"),
    ("hub/x.py", "from jaxreward import testing", "hub may not import jaxreward.testing"),
    ("evals/x.py", "from jaxreward.train import loop", "evals may not import jaxreward.train.loop"),
    ("evals/x.py", "from jaxreward import train", "evals may not import jaxreward.train"),
    ("evals/x.py", "from jaxreward.recipes import evaluate", "evals may not import"),
    ("report/x.py", "from jaxreward.evals import pairwise", "report may not import"),
    ("recipes/x.py", "from jaxreward.recipes import preference", "recipes do not import each"),
    ("recipes/x.py", "from .preference import run", "recipes do not import each"),
    ("recipes/x.py", "from jaxreward import cli", "recipes may not import jaxreward.cli"),
    ("testing.py", "from jaxreward.train import step", "testing may not import"),
    ("presets.py", "from jaxreward import sampling", "presets may not import"),
    ("train/x.py", "import jaxreward\njaxreward.recipes.preference", "not all of jaxreward"),
    ("train/x.py", "from jaxreward import *", "not all of jaxreward"),
    ("train/x.py", "import orbax.checkpoint as ocp", "orbax at import time"),
    ("cli.py", "import torch", "torch at import time"),
    ("hub/x.py", "try:\n  import gguf\nexcept ImportError:\n  gguf = None", "gguf at import time"),
    ("report/x.py", "class A:\n  from matplotlib import figure", "matplotlib at import time"),
    ("data/x.py", "if True:\n  import grain", "grain at import time"),
    ("train/x.py", "with open(0):\n  import tokenizers", "tokenizers at import time"),
    ("plugins/x.py", "import os", "'plugins' is no layer"),
    ("../configs/a/b.py", "from jaxreward.models import decoder", "configs may not import"),
    ("../configs/a/b.py", "import numpy as np", "configs imports only ml_collections"),
    ("../configs/a/b.py", "import os", "only ml_collections and presets"),
    ("train/x.py", "import importlib\nimportlib.import_module('a')", "import_module hides"),
    ("train/x.py", "__import__('jaxreward.recipes')", "__import__ hides"),
    ("core/x.py", "x = 1", "no docstring"),
    ("core/x.py", '"""M."""\ndef f(): pass', "f has no docstring"),
    ("core/x.py", '"""M."""\nif 1:\n  async def f(): pass', "f has no docstring"),
    ("core/x.py", '"""M."""\nclass A:\n  """A."""\n  def f(self): pass', "A.f has no docstring"),
    ("core/x.py", '"""M."""\nclass A:\n  def _f(self): pass', "A has no docstring"),
    ("core/x.py", "\n" * 601, "601 lines"),
    ("train/utils.py", "x = 1", "name the concern, not 'utils'"),
    ("train/step_utils.py", "x = 1", "name the concern"),
    ("utils/step.py", "x = 1", "name the concern"),
]


def at(path):
    """A made-up path inside the package, or beside it."""
    return path.removeprefix("../") if path.startswith("../") else f"jaxreward/{path}"


@pytest.mark.parametrize(("path", "source", "text"), FORBIDDEN)
def test_a_violation_is_caught(path, source, text):
    """Catches a rule that lets through what it is there for."""
    faults = [fault for rule in RULES for fault in rule(at(path), source)]
    assert any(text in fault for fault in faults), faults


ALLOWED = [
    (
        "core/x.py",
        "import re\nimport jax.numpy as jnp\nimport numpy as np\nfrom flax import struct",
    ),
    (
        "core/x.py",
        "from jaxreward.core import trees\nfrom . import masked\nfrom flax.struct import x",
    ),
    ("parallel/x.py", "from jaxreward.core import trees\nfrom jax.sharding import NamedSharding"),
    ("models/x.py", "from jaxreward.parallel.rules import Rules\nfrom ..core import types"),
    ("data/corpora/x.py", "from jaxreward.rewards.final_number import final_number"),
    ("data/x.py", "def f():\n  import grain, transformers"),
    ("hub/x.py", "from jaxreward import __version__\ndef f():\n  from jaxreward import testing"),
    ("evals/x.py", "from jaxreward.train import checkpoint"),
    ("evals/x.py", "from jaxreward.train.checkpoint import Checkpoints"),
    ("recipes/x.py", "from jaxreward import presets, testing\nfrom jaxreward.hub import load"),
    ("recipes/staged.py", "from jaxreward.recipes import preference"),
    ("recipes/x.py", "f = lambda: __import__\ndef g():\n  import torch"),
    ("cli.py", "import jaxreward\ndef f():\n  from jaxreward.recipes import evaluate"),
    ("../configs/a/b.py", "from ml_collections import ConfigDict\nfrom jaxreward import presets"),
]

DOCUMENTED = [
    '"""M."""\ndef _f(): pass\nclass A:\n  """A."""\n  def _g(self): pass',
    '"""M."""\ndef f():\n  """F."""\n  def inner(): pass\n  class B: pass',
]


@pytest.mark.parametrize(("path", "source"), ALLOWED)
def test_what_is_allowed_passes(path, source):
    """Catches a rule so strict that it would be switched off."""
    rules = (layer_faults, dynamic_faults, shape_faults)
    assert [fault for rule in rules for fault in rule(at(path), source)] == []


@pytest.mark.parametrize("source", DOCUMENTED)
def test_private_and_inner_names_need_no_docstring(source):
    """Catches a rule that asks for empty words."""
    assert docstring_faults("jaxreward/core/x.py", source) == []


def modules(layer=None):
    """Dotted names of the package's modules; `__main__` would run the command line."""
    paths = [p for p in SOURCES if p.startswith("jaxreward/") and not p.endswith("__main__.py")]
    names = [p.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for p in paths]
    return [n for n in names if layer is None or n.startswith(f"jaxreward.{layer}")]


def loaded_after(names, *, watch, also="0"):
    """Imports the modules in a new process; returns which of `watch` are loaded, and `also`."""
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"print(sorted({set(watch)!r} & set(sys.modules)) if {bool(watch)} else [], {also})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_everything_starts_no_backend_and_loads_nothing_heavy():
    """Catches what no parsing sees: a library that pulls in another, `jax.devices()` at the top."""
    also = "__import__('jax')._src.xla_bridge.backends_are_initialized()"
    assert loaded_after(modules(), watch=HEAVY, also=also) == "[] False"


def test_data_and_rewards_run_in_processes_without_jax():
    """Catches jax reached through a detour: data workers are processes and must start fast."""
    names = [*modules("data"), *modules("rewards")]
    assert len(names) > 8
    assert loaded_after(names, watch={"jax", "jaxlib", "flax"}) == "[] 0"
