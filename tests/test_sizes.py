"""Files, functions and records stay small enough to read. The table is printed with `pytest -s`."""

import ast
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]

FILE_LINES = 400
FUNCTION_LINES, KERNEL_LINES = 60, 80
PARAMETERS, KERNEL_PARAMETERS = 7, 20
CONFIG_FIELDS = 12


@cache
def sources():
    """Every Python file of the repository: those that git tracks or would, or all in an unpacked archive."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    names = listed.stdout.splitlines() or [str(file.relative_to(ROOT)) for file in ROOT.rglob("*.py")]
    hidden = (".venv", "build", "dist")
    return sorted(
        {(ROOT / n).resolve() for n in names if n.split("/")[0] not in hidden and (ROOT / n).exists()}
    )


@cache
def tree(file):
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def functions():
    """(where, node, whether it is a Triton kernel) of every function."""
    for file in sources():
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                kernel = any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
                yield f"{file.relative_to(ROOT)}:{node.lineno} {node.name}", node, kernel


def length(node):
    """Lines of a function without its docstring, which the style wants complete rather than short."""
    lines = node.end_lineno - node.lineno + 1
    first = node.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return lines - (first.end_lineno - first.lineno + 1 if is_docstring else 0)


def parameters(node):
    """Positional ones: one that is named where it is given does not make a call hard to read."""
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
    return len([name for name in names if name not in ("self", "cls", "ctx")])


def config_fields():
    """(where, number of fields) of every dataclass that a user fills in; a loss has what its paper has."""
    for file in sources():
        inside = file.relative_to(ROOT)
        if inside.parts[0] != "tokenkit" or inside == Path("tokenkit/losses/options.py"):
            continue
        for node in ast.walk(tree(file)):
            if not isinstance(node, ast.ClassDef) or "dataclass" not in "".join(
                map(ast.unparse, node.decorator_list)
            ):
                continue
            if node.name.endswith(("Options", "Config")) or "config" in file.parts:
                fields = [statement for statement in node.body if isinstance(statement, ast.AnnAssign)]
                yield f"{file.relative_to(ROOT)}:{node.lineno} {node.name}", len(fields)


def check(title, limit, sizes):
    """Print the five largest, and fail where one is beyond the limit."""
    largest = sorted(sizes, key=lambda pair: -pair[1])
    print(f"\n{title} (at most {limit})")
    for name, size in largest[:5]:
        print(f"{size:6d}  {name}")
    assert [f"{name}: {size} > {limit}" for name, size in largest if size > limit] == []


def test_files_are_short():
    sizes = [
        (str(file.relative_to(ROOT)), len(file.read_text(encoding="utf-8").splitlines()))
        for file in sources()
    ]
    check("lines of a file", FILE_LINES, sizes)


def test_functions_are_short():
    check(
        "lines of a function",
        FUNCTION_LINES,
        [(n, length(f)) for n, f, is_kernel in functions() if not is_kernel],
    )
    check("lines of a kernel", KERNEL_LINES, [(n, length(f)) for n, f, is_kernel in functions() if is_kernel])


def test_functions_take_few_parameters():
    # the parameters of a parametrised test are the columns of its table
    plain = [
        (n, node) for n, node, is_kernel in functions() if not is_kernel and not node.name.startswith("test_")
    ]
    sizes = [(name, parameters(node)) for name, node in plain]
    check("positional parameters of a function", PARAMETERS, sizes)
    kernels = [(name, parameters(node)) for name, node, is_kernel in functions() if is_kernel]
    check("parameters of a kernel", KERNEL_PARAMETERS, kernels)


def test_configurations_have_few_fields():
    check("fields of a configuration", CONFIG_FIELDS, list(config_fields()))
