r"""Tests for the layout of the repository."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

TOP = {
    *("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", ".gitignore", "conftest.py"),
    *(".ci", "probnets", "compression", "priors", "tests", "benchmarks"),
}

# What each part of the library may import of the others. The command may import all.
ARROWS = {
    "backend": set(),
    "data": set(),
    "layers": {"backend"},
    "circuits": {"backend", "data", "layers"},
    "coding": {"backend", "circuits"},
    "cli": {"backend", "circuits", "coding", "data"},
    "boltzmann": {"backend", "layers"},
    "sampling": {"backend", "layers"},
    "priors": {"backend", "layers", "sampling"},
    "bottleneck": {"backend", "layers"},
}

FREE = {"probnets/__init__.py", "probnets/__main__.py", "probnets/cli/commands.py"}

# Paths of one machine, and registries. A pattern does not match its own text.
FORBIDDEN = re.compile(
    r"(?<![\w.])/(work|tmp|root|home)/|(pypi|pythonhosted|download\.pytorch)\.org|file:/{3}"
)

LIBRARY = sorted((ROOT / "probnets").rglob("*.py"))
PROGRAMS = sorted(
    file
    for name in ("compression", "priors", "benchmarks")
    for file in (ROOT / name).rglob("*.py")
)


def name(file):
    return file.relative_to(ROOT).as_posix()


def tree(file):
    return ast.parse(file.read_text("utf-8"), name(file))


@pytest.fixture(scope="module")
def checkout():
    r"""Lists the files that git tracks or would track."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs a git checkout")

    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode != 0:
        pytest.skip(f"needs a git checkout that git reads: {result.stderr.strip()}")

    return [ROOT / file for file in result.stdout.split("\0") if (ROOT / file).is_file()]


# Folders and files


def test_top_level(checkout):
    assert {file.relative_to(ROOT).parts[0] for file in checkout} <= TOP


def test_programs_are_no_packages(checkout):
    # A package of the name `compression` would stand before the standard library's.
    for file in checkout:
        assert file.name != "__init__.py" or file in LIBRARY, name(file)


@pytest.mark.parametrize("file", LIBRARY, ids=name)
def test_length(file):
    assert len(file.read_text("utf-8").splitlines()) <= 600


@pytest.mark.parametrize("file", [f for f in LIBRARY if f.name[:2] != "__"], ids=name)
def test_leaf_modules_state_their_names(file):
    module = tree(file)
    assert ast.get_docstring(module)

    first = next(node for node in module.body[1:] if not _is_future(node))
    assert isinstance(first, ast.Assign), "__all__ stands right below the docstring"
    assert ast.unparse(first.targets[0]) == "__all__"


def _is_future(node):
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


@pytest.mark.parametrize("file", PROGRAMS, ids=name)
def test_programs(file):
    module = tree(file)
    assert ast.get_docstring(module)
    assert len(file.read_text("utf-8").splitlines()) <= 180

    functions = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}
    main = functions["main"]
    assert [argument.arg for argument in main.args.args] == ["argv"]
    assert main.returns is not None
    assert ast.unparse(main.returns) == "int"

    constants = {node.value for node in ast.walk(module) if isinstance(node, ast.Constant)}
    assert "--smoke" in constants


# Imports


def imported(file):
    r"""Lists the parts of the library that a module imports, at its top or inside."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = file.relative_to(ROOT).parts[: -node.level]
                base = ".".join((*package, *filter(None, [base])))
            modules = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue

        for module in modules:
            parts = module.split(".")
            if parts[0] == "probnets":
                yield ".".join(parts[1:2])


@pytest.mark.parametrize("file", [f for f in LIBRARY if name(f) not in FREE], ids=name)
def test_arrows_run_one_way(file):
    part = file.relative_to(ROOT / "probnets").parts[0].removesuffix(".py")
    assert part in ARROWS, "a new part states its arrows in ARROWS"
    assert set(imported(file)) <= {part} | ARROWS[part]


def test_imports_are_understood(tmp_path, monkeypatch):
    file = tmp_path / "probnets/coding/stream.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import os, probnets.a.x\nfrom . import y\nfrom .z import w\nfrom ..b import v\n"
        "from probnets import c\nfrom probnets.d.e import f\nfrom .. import g\nimport probnets\n"
        "def late():\n    from probnets.h import i\n"
    )
    monkeypatch.setitem(globals(), "ROOT", tmp_path)

    assert set(imported(file)) == {"a", "coding", "b", "c", "d", "g", "", "h"}


def test_arrows_have_no_cycle():
    order = []
    while len(order) < len(ARROWS):
        free = [p for p in ARROWS if p not in order and ARROWS[p] <= set(order)]
        assert free, f"a cycle among {sorted(ARROWS.keys() - set(order))}"
        order += free


# The README and CI


def fences(language):
    r"""Returns the code blocks of the README in one language, each with its line number."""
    text = (ROOT / "README.md").read_text("utf-8")
    for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield text.count("\n", 0, match.start(1)), match.group(1)


def test_setup_is_two_commands():
    sections = re.split(r"^## ", (ROOT / "README.md").read_text("utf-8"), flags=re.MULTILINE)
    counts = [len(re.findall(r"^```sh$", section, re.MULTILINE)) for section in sections]
    if not any(counts):
        pytest.skip("the README has no commands yet")

    assert next(filter(None, counts)) == 2, "the first section with commands has two: set-up"


def test_ci_runs_the_second_command():
    blocks = [block for _, block in fences("sh")]
    bash = shutil.which("bash")
    if len(blocks) < 2 or bash is None:
        pytest.skip("needs the commands of the README, and bash")

    shown = subprocess.run([bash, ".ci/run", "--show"], cwd=ROOT, capture_output=True, text=True)
    assert shown.stdout == blocks[1], shown.stderr
    assert "pytest" in blocks[1]


def test_readme_examples_run(tmp_path, monkeypatch):
    blocks = list(fences("python"))
    if not blocks:
        pytest.skip("the README has no examples yet")

    monkeypatch.chdir(tmp_path)
    space = {"__name__": "readme"}
    for line, block in blocks:
        code = compile("\n" * line + block, str(ROOT / "README.md"), "exec")
        exec(code, space)


def test_no_file_names_a_machine(checkout):
    for file in checkout:
        try:
            text = file.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # pictures and golden bytes

        found = FORBIDDEN.search(text)
        assert not found, f"{name(file)}: {found}"


def test_forbidden_names_are_found():
    for bad in ("/work" + "/main", "in /tmp" + "/x", "https://pypi" + ".org", "file:/" + "//x"):
        assert FORBIDDEN.search(bad), bad
    for good in ("../shared/data", "a/work/b", "www.apache.org/licenses/", "./tmp/"):
        assert not FORBIDDEN.search(good), good
