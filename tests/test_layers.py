"""Imports point one way, heavy packages stay in their rooms, and nothing loads or runs what it should not."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tokenkit.models.peer_mla import FILES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tokenkit"

LAYERS = [
    {"errors"},
    {"options", "disk"},
    {"structs", "optim_options"},
    {"kernels"},
    {"tokenization"},
    {"pairing"},
    {"data", "losses", "models", "parallel", "optim"},
    {"run"},
    {"embeddings"},
    {"objective"},
    {"config"},
    {"evaluation", "export", "training"},
    {"doors", "integrations"},
]
"""Lowest first. A module imports its own room and lower layers; see docs/architecture.md."""

SIBLINGS = {"evaluation", "export", "training"}
"""The loop calls evaluation and export: within this layer only cycles are refused."""

CORE = {"structs", "kernels", "losses"}
"""Other trainers pull these in: torch, triton and the standard library alone."""

TRAINERS = {"transformers", "trl", "lightning", "accelerate", "torchtitan", "axolotl", "swift"}
"""Each has a file in `integrations`, which alone may import it, and at once: its class inherits."""

TRAVELLERS = {f"tokenkit.models.peer_mla.{name}" for name in FILES}
"""Copied into a model's folder: classes of transformers, which import each other relatively."""

OWNERS = {
    "transformers": 11,
    "tokenizers": 4,
    "peft": 2,
    "datasets": 3,
    "wandb": 2,
    "tyro": 2,
    "omegaconf": 2,
    "lm_eval": 2,
    "matplotlib": 3,
    "rich": 2,
}
"""The largest number of files that may import each of these."""


def sources():
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    return sorted({file.resolve() for file in files if "__pycache__" not in file.parts})


def module_name(file):
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    parts = ["tokenkit", *parts] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree(file):
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def guarded(file):
    """Nodes under `if TYPE_CHECKING`: they are never imported."""
    tests = [n for n in ast.walk(tree(file)) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]
    return {id(node) for test in tests for statement in test.body for node in ast.walk(statement)}


def imports(file):
    """(imported module, whether it is imported when this module is) of every import in a file."""
    skipped = guarded(file)
    functions = [n for n in ast.walk(tree(file)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    late = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree(file)):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                assert module_name(file) in TRAVELLERS, f"{file}: imports are absolute"
            yield from ((target, id(node) not in late) for target in _targets(node, file))


def _targets(node, file):
    """`from tokenkit.models import lora` imports tokenkit.models.lora, where that is a module."""
    known = modules()
    module = f"{module_name(file).rpartition('.')[0]}.{node.module}" if node.level else node.module
    inner = [f"{module}.{alias.name}" for alias in node.names if f"{module}.{alias.name}" in known]
    return inner if len(inner) == len(node.names) else [module, *inner]


@cache
def modules():
    return {module_name(file): file for file in sources()}


def room(module):
    """The room of `tokenkit.a.b`: `a`; of `commands` and of a file at the top `doors`."""
    parts = module.split(".")
    if len(parts) == 1:
        return "structs"  # the package itself: a docstring and a version
    known = set().union(*LAYERS)
    return parts[1] if parts[1] in known else "doors"


def rank(room_name):
    return next(index for index, layer in enumerate(LAYERS) if room_name in layer)


def test_imports_point_one_way():
    wrong = []
    for name, file in modules().items():
        for target, _ in imports(file):
            if target.split(".")[0] != "tokenkit" or room(target) == room(name):
                continue
            here, there = room(name), room(target)
            if not (rank(there) < rank(here) or {here, there} <= SIBLINGS):
                wrong.append(f"{name} ({here}) imports {target} ({there})")
    assert wrong == []


def test_no_module_imports_itself_in_a_circle():
    edges = {
        name: {t for t, at_once in imports(file) if at_once and t in modules() and t != name}
        for name, file in modules().items()
    }
    done, circles = set(), []

    def visit(name, path):
        if name in path:
            circles.append(" -> ".join([*path[path.index(name) :], name]))
        elif name not in done:
            for target in sorted(edges[name]):
                visit(target, [*path, name])
            done.add(name)

    for name in edges:
        visit(name, [])
    assert circles == []


def test_the_core_imports_torch_and_triton_only():
    allowed = {"torch", "triton", "tokenkit", *sys.stdlib_module_names}
    wrong = [
        f"{name} imports {target}"
        for name, file in modules().items()
        if room(name) in CORE
        for target, _ in imports(file)
        if target.split(".")[0] not in allowed
    ]
    assert wrong == []


def test_losses_work_where_only_torch_and_triton_are_installed():
    missing = [*OWNERS, "safetensors", "huggingface_hub", "yaml", "regex", "tqdm", "accelerate", "pyarrow"]
    program = (
        "import sys\n"
        f"for name in {missing!r}: sys.modules[name] = None\n"
        "import tokenkit.losses, tokenkit.structs\n"
        "print(sorted(tokenkit.losses.LOSSES))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("package", OWNERS)
def test_a_heavy_package_is_imported_in_few_files(package):
    users = {
        name
        for name, file in modules().items()
        if name not in TRAVELLERS and any(t.split(".")[0] == package for t, _ in imports(file))
    }
    assert len(users) <= OWNERS[package], f"{package} is imported by {sorted(users)}"


@pytest.mark.parametrize(
    "package", ["transformers", "peft", "datasets", "wandb", "tyro", "lm_eval", "matplotlib"]
)
def test_a_heavy_package_is_imported_late(package):
    early = {
        name
        for name, file in modules().items()
        if room(name) != "integrations"
        and name not in TRAVELLERS
        and any(t.split(".")[0] == package and at_once for t, at_once in imports(file))
    }
    assert early == set()


def test_the_door_to_other_trainers_imports_none_of_them():
    program = (
        "import sys, tokenkit.integrations as ours\n"
        "ours.hidden_states, ours.Distiller, ours.FlatCollator\n"
        f"print(sorted({TRAINERS!r} & set(sys.modules)))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.strip() == "[]"


def test_only_its_own_file_imports_a_trainer():
    users = {}
    for name, file in modules().items():
        for trainer in TRAINERS - {"transformers"} & {target.split(".")[0] for target, _ in imports(file)}:
            users.setdefault(trainer, set()).add(name)
    assert all(found == {f"tokenkit.integrations.{trainer}"} for trainer, found in users.items())


def calls(file):
    return [node for node in ast.walk(tree(file)) if isinstance(node, ast.Call)]


def keyword(call, name):
    values = [k.value for k in call.keywords if k.arg == name]
    return values[0].value if values and isinstance(values[0], ast.Constant) else None


def is_forbidden(call):
    spelled = ast.unparse(call.func)
    return (
        spelled
        in ("eval", "exec", "os.system", "pickle.load", "pickle.loads", "yaml.unsafe_load", "yaml.full_load")
        or (spelled == "torch.load" and keyword(call, "weights_only") is not True)
        or (spelled == "yaml.load" and "Loader=_Loader" not in ast.unparse(call))
        or keyword(call, "shell") is True
        or keyword(call, "allow_pickle") is True
        or keyword(call, "trust_remote_code") is True
    )


def test_nothing_runs_or_unpickles_what_it_reads():
    found = [
        f"{name}:{call.lineno}"
        for name, file in modules().items()
        for call in calls(file)
        if is_forbidden(call)
    ]
    assert found == []


def test_only_the_safe_reader_touches_pickle():
    users = {
        name for name, file in modules().items() if any(t.split(".")[0] == "pickle" for t, _ in imports(file))
    }
    assert users <= {"tokenkit.run.safe_dcp"}
