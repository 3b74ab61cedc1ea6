"""What `doctor` says of compiling without a GPU: for which architectures, and with which tools."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from chela_bench.profiles.doctor import Check
from chela_bench.profiles.occupancy import ARCHS
from chela_bench.profiles.static import TOOLS

LIMIT_S = 120.0
_TOOL_LIMIT_S = 20.0
AGAIN = "pip install --force-reinstall --no-deps triton"
_PROBE = Path(__file__).with_name("compile_probe.py")
_WITHOUT = {
    "ptxas": "nothing compiles for sm_75 to sm_90",
    "ptxas-blackwell": "nothing compiles for sm_100 and later",
    "cuobjdump": "atlas and tune find no registers",
    "nvdisasm": "atlas and tune count no instructions",
}


@dataclass(frozen=True)
class Compiling:
    """What compiling showed. `problems`: by architecture, null where it worked."""

    error: str | None = None  # the probe itself could not run
    problems: dict[str, str | None] = field(default_factory=dict)
    tools: dict[str, str | None] = field(default_factory=dict)  # why it does not run, or null


def compiling(archs: Sequence[str] = tuple(ARCHS)) -> Compiling:
    """Compiles a small kernel for each, in a process of its own: a compiler may hang or crash."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return Compiling(error="triton is not installed")
    tools = {name: _tool_problem(Path(spec.origin).parent, name) for name in TOOLS}
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(_PROBE), *archs],
            capture_output=True, text=True, timeout=LIMIT_S, env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Compiling(f"a small kernel took longer than {LIMIT_S:g} s", tools=tools)
    except OSError as error:
        return Compiling(f"no process can be started: {error.strerror}", tools=tools)
    try:
        problems = json.loads(done.stdout.splitlines()[-1])["problems"]
    except (ValueError, IndexError, KeyError, TypeError):
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        reason = f"the compiler ended with {done.returncode}: {said[:200]}"
        return Compiling(reason, tools=tools)
    return Compiling(problems=problems, tools=tools)


def _tool_problem(triton: Path, name: str) -> str | None:
    """Why one of the tools that Triton brings along does not run."""
    path = triton / "backends" / "nvidia" / "bin" / name
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=_TOOL_LIMIT_S
        )
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"does not run: {error.strerror}"
    except subprocess.TimeoutExpired:
        return "hangs"
    return None if done.returncode == 0 else f"ends with exit code {done.returncode}"


def examine_compiling(found: Compiling) -> Iterator[Check]:
    """One line for what compiles, one for each reason why something does not, one for the tools."""
    name = "static compile"
    if found.error is not None:
        yield Check(name, "warning", f"none: {found.error}; atlas cannot work", AGAIN)
    able = [arch for arch, problem in found.problems.items() if problem is None]
    if able:
        yield Check(name, "ok", f"{', '.join(able)}, without a GPU")
    reasons: dict[str, list[str]] = {}
    for arch, problem in found.problems.items():
        if problem is not None:
            reasons.setdefault(_one_line(problem), []).append(arch)
    for reason, archs in reasons.items():
        yield Check(name, "warning", f"not {', '.join(archs)}: {reason}", _remedy(reason))
    broken = {tool: problem for tool, problem in found.tools.items() if problem is not None}
    for tool, problem in broken.items():
        yield Check("tools", "warning", f"{tool} {problem}: {_WITHOUT[tool]}", AGAIN)
    if found.tools and not broken:
        yield Check("tools", "ok", f"{', '.join(found.tools)}, from Triton")


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]


def _remedy(reason: str) -> str:
    if "compatible backends" in reason:
        return f"this Triton has no such backend; {AGAIN}"
    return f"leave the architecture out with --arch, or install Triton again: {AGAIN}"
