"""The house's rules: who may import whom, what stays unimported, where an op must show up."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from chela_bench.bench.config import find_config, load_config
from chela_bench.bench.load import load
from chela_bench.bench.ops import OPS
from tests.running import ROOT, environment

PACKAGE = ROOT / "chela_bench"

HEAVY = {"torch", "triton"}
# Room -> what its files may import: rooms of ours, and heavy packages of others.
ARROWS = {
    "reference": {"errors", "torch"},
    "kernels": {"reference", "errors", "torch", "triton"},
    "profiles": {"errors", "records", "torch", "triton"},
    "bench": {"kernels", "reference", "profiles", "records", "verdicts", "errors", *HEAVY},
    "reports": {"records", "verdicts", "errors"},
    "cli": {"bench", "profiles", "reports", "records", "verdicts", "errors"},
    "records": set(),
    "verdicts": set(),
    "errors": set(),
    "__main__": {"cli"},
    "__init__": set(),
}


@cache
def _imports(path: Path) -> set[str]:
    """Rooms of ours and heavy packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the arrow"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            if first == "chela_bench":
                found.add(rest.split(".")[0])
            elif first in HEAVY:
                found.add(first)
    return found - {"__version__"}


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_down(path):
    room = _room(path)
    allowed = ARROWS[room] | {room}
    assert _imports(path) <= allowed


def test_kernels_but_the_layer_and_its_models_know_no_reference():
    kernels = [path for path in FILES if _room(path) == "kernels"]
    known = [path.name for path in kernels if "reference" in _imports(path)]
    parts = ("", "_config", "_decode", "_graph", "_models")
    assert known == [f"chela{part}.py" for part in parts]


def test_every_room_is_in_the_map():
    assert {_room(path) for path in FILES} == set(ARROWS)


STATEMENTS = [
    "import chela_bench",
    "import chela_bench.cli",
    "import chela_bench.cli.list",
    "import chela_bench.cli.sweep",
    "import chela_bench.cli.report",
    "import chela_bench.cli.runs, chela_bench.cli.show, chela_bench.cli.completion",
    "import chela_bench.cli.compare, chela_bench.cli.gate, chela_bench.cli.noise",
    "import chela_bench.bench.pytest_plugin, chela_bench.bench.pytest_fixture",
    "import chela_bench.cli.doctor, chela_bench.profiles.doctor",
    "import chela_bench.cli.atlas, chela_bench.cli.tune",
    "import chela_bench.bench.plan, chela_bench.bench.sweep, chela_bench.bench.runner",
    "from click.testing import CliRunner; from chela_bench.cli import cli; "
    "assert CliRunner().invoke(cli, ['--help']).exit_code == 0",
    "from click.testing import CliRunner; from chela_bench.cli import cli; "
    "assert CliRunner().invoke(cli, ['list']).exit_code == 0",
]


@pytest.fixture(scope="module")
def imported():
    """By statement: the modules that it imports after those before it, in one process. What one
    imports by itself is among its own and theirs."""
    code = ["import sys", "before = set(sys.modules)"]
    for statement in STATEMENTS:
        code += [statement, "print(*set(sys.modules) - before)", "before = set(sys.modules)"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)],
        env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    return {words: set(line.split()) for words, line in zip(STATEMENTS, lines, strict=True)}


@pytest.mark.parametrize("statement", STATEMENTS)
def test_the_command_line_imports_no_torch(imported, statement):
    assert not imported[statement] & HEAVY


def test_importing_the_package_imports_nothing_else(imported):
    ours = {name for name in imported["import chela_bench"] if name.startswith("chela_bench")}
    assert ours == {"chela_bench"}


def test_importing_every_room_starts_no_cuda_and_changes_no_environment():
    code = (
        "import os; before = dict(os.environ); import torch; "
        "default = torch.get_default_dtype(); "
        "import chela_bench.bench.worker, chela_bench.bench.measure, chela_bench.bench.peers, "
        "chela_bench.kernels.linear_attention, chela_bench.profiles.ceilings; "
        "assert not torch.cuda.is_initialized(); assert torch.get_default_dtype() is default; "
        "assert not torch.are_deterministic_algorithms_enabled(); "
        "assert {k: v for k, v in os.environ.items() if k in before} == before; "
        "print(*set(os.environ) - set(before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert [name for name in done.stdout.split() if "CHELA" in name or "TRITON" in name] == []


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_an_op_is_in_all_its_places(op):
    """Reference, tests, Op, shapes; and a kernel file as soon as an implementation is ours."""
    stems = {"chela_layer": "chela"}
    stems |= dict.fromkeys(["long_conv", "reparameterization"], "short_long_conv")
    stem = stems.get(op.name, op.name)
    assert (PACKAGE / "reference" / f"{stem}.py").exists()
    assert (ROOT / "tests" / f"test_{stem}.py").exists()
    assert load_config(find_config(ROOT / "bench.toml")).shapes[op.name]
    if any(impl.name.startswith("triton") for impl in op.impls):
        assert (PACKAGE / "kernels" / f"{stem}.py").exists()
    assert callable(load(op.inputs))
    assert callable(load(op.oracle))
    for impl in op.impls:
        assert callable(load(impl.target)), impl.name


def test_pre_commit_runs_the_tools_of_make_check():
    recipe = subprocess.run(
        ["make", "-n", "--no-print-directory", "check", "PYTHON=.venv/bin/python"],
        cwd=ROOT, capture_output=True, text=True, check=True,
        env={name: value for name, value in os.environ.items() if name != "MAKEFLAGS"},
    )  # fmt: skip
    entries = re.findall(r"entry: (.+)", (ROOT / ".pre-commit-config.yaml").read_text())
    ours = [re.sub(r"( --\S+| \.)+$", "", line) for line in recipe.stdout.splitlines()]
    assert [re.sub(r"( --\S+)+$", "", entry) for entry in entries] == ours


def test_names_are_unique():
    names = [(op.name, impl.name) for op in OPS for impl in op.impls]
    assert len(names) == len(set(names))
    assert len({op.name for op in OPS}) == len(OPS)
