"""Every kernel of some cases, compiled for GPUs that are not there: what `atlas` and `tune` ask.

No torch here: a process of its own (compiler.py) imports, compiles and may die.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chela_bench.bench import plan
from chela_bench.bench.cases import Case
from chela_bench.bench.config import Config
from chela_bench.bench.lengths import parse_lengths
from chela_bench.bench.ops import Impl, Op
from chela_bench.bench.plan import Flags, Settings
from chela_bench.bench.registry import all_ops, get_op
from chela_bench.bench.runner import main_of
from chela_bench.bench.store import write_atomically
from chela_bench.errors import EnvironmentProblem, UsageError
from chela_bench.profiles import machine
from chela_bench.profiles.occupancy import find_arch
from chela_bench.records import AtlasRow, Refused

DEFAULT_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
DEFAULT_LENS = "128,1k,2k,4k,16k,64k"  # a kernel of the long convolution each
DEFAULT_DIRECTIONS = ("fwd", "fwdbwd", "decode")  # those that an op has
DEFAULT_AXES = {"BLOCK_T": [32, 64, 128], "BLOCK_V": [32, 64, 128]}  # of ops that take both
LIMIT_S = 120.0  # for one kernel's compiler
_WORKER = main_of("chela_bench.bench.compiler")


@dataclass(frozen=True)
class Options:
    """How to compile."""

    parallel: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    limit_s: float = LIMIT_S
    cache: Path | None = field(default_factory=lambda: cache_folder())
    keep: bool = False  # compiled kernels, in Triton's own cache, for launches to come
    processors: int | None = None  # of the card; None: of a usual one of the architecture


@dataclass
class Found:
    """All rows, and the calls that launch nothing."""

    triton: str = ""
    rows: list[AtlasRow] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    # By architecture, then by the case's key: places of its rows.
    by_case: dict[str, dict[str, list[int]]] = field(default_factory=dict)

    def rows_of(self, arch: str, case: Case) -> list[AtlasRow]:
        return [self.rows[i] for i in self.by_case.get(arch, {}).get(case.key, ())]


Progress = Callable[[str, int, int], None]  # architecture, kernels done, kernels in all


def cache_folder() -> Path:
    """As the XDG rules have it."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "chela-bench" / "atlas"


def triton_impls(op: Op) -> list[Impl]:
    return [impl for impl in op.impls if impl.triton]


def resolve(config: Config, flags: Flags) -> Settings:
    """Ops, implementations, shapes and axes as `sweep` reads them, but those that Triton compiles,
    at lengths that reach every kernel."""
    names = flags.ops or [op.name for op in all_ops() if triton_impls(op)]
    ops = [get_op(name) for name in names]
    for op in ops:
        if not triton_impls(op) and not flags.impls:
            able = [op.name for op in all_ops() if triton_impls(op)]
            raise UsageError(f"no kernel of ours computes {op.name}; there are: {', '.join(able)}")
    impls = flags.impls or [impl.name for op in ops for impl in triton_impls(op)]
    given: dict[str, Any] = {
        "ops": [op.name for op in ops],
        "impls": list(dict.fromkeys(impls)),
        "lens": flags.lens or DEFAULT_LENS,
        "directions": flags.directions or DEFAULT_DIRECTIONS,
    }
    parse_lengths(given["lens"])
    settings = plan.resolve(config, _with(flags, **given), ["cuda"])
    if flags.axes or flags.impls:
        return settings
    takes_both = any(
        set(DEFAULT_AXES) <= set(impl.axes or ()) for op in ops for impl in triton_impls(op)
    )
    if not takes_both:
        return settings
    return plan.resolve(config, _with(flags, **given, axes=DEFAULT_AXES), ["cuda"])


def _with(flags: Flags, **changes: Any) -> Flags:
    from dataclasses import replace

    return replace(flags, **changes)


def cases(settings: Settings) -> list[Case]:
    """Each call once: a backward alone launches nothing that both in one do not, and a step
    launches the same whatever the length of its cache."""
    found = plan.cases(settings)
    longest = max((case.shape["T"] for case in found), default=0)
    kept = []
    for case in found:
        impl = plan.find_impl(settings, get_op(case.op), case.impl)
        if case.direction not in impl.directions:
            continue
        if case.direction == "decode" and (case.config or case.shape["T"] != longest):
            continue
        kept.append(case)
    return kept


def compile_all(
    cases: Sequence[Case],
    archs: Sequence[str],
    options: Options,
    *,
    user_impls: Mapping[str, str] | None = None,
    progress: Progress = lambda arch, done, total: None,
) -> Found:
    """Rows in the order of architectures, then of cases.

    Raises UsageError for an architecture that there is not, or a user's file that does not import,
    and EnvironmentProblem if the process that compiles cannot.
    """
    for arch in archs:
        find_arch(arch)
    found = Found()
    rows: list[tuple[dict[str, Any], list[int], int]] = []
    memory = _Memory(cases, options, user_impls or {})
    waiting = [arch for arch in archs if not memory.recall(arch)]
    for arch in archs:
        if arch not in waiting:
            count = sum("row" in answer for answer in memory.answers[arch])
            progress(arch, count, count)
    if waiting:
        request = {
            "archs": waiting,
            "cases": [case.model_dump(mode="json") for case in cases],
            "impls": dict(user_impls or {}),
            "parallel": options.parallel,
            "limit_s": options.limit_s,
            "cache": None if options.cache is None else str(options.cache),
            "keep": options.keep,
            "processors": options.processors,
        }
        _compile(request, memory, progress)
    found.triton = memory.triton
    for arch in archs:
        for answer in memory.answers[arch]:
            if "row" in answer:
                rows.append((answer["row"], answer["cases"], answer["place"]))
            else:
                found.refused.append(_refused(answer, cases))
    places = [(archs.index(row["arch"]), min(users), place) for row, users, place in rows]
    for i in sorted(range(len(rows)), key=places.__getitem__):
        row, users, _ = rows[i]
        by_key = found.by_case.setdefault(row["arch"], {})
        for _, group in itertools.groupby(users, key=lambda user: _who(cases[user])):
            some = [cases[user] for user in group]
            for case in some:
                by_key.setdefault(case.key, []).append(len(found.rows))
            found.rows.append(_row(row, some, found.triton))
    return found


def _compile(request: dict[str, Any], memory: _Memory, progress: Progress) -> None:
    """Fills the memory with the answers about each of the request's architectures."""
    done: dict[str, int] = {}
    total: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="chela-atlas-") as scratch:
        for answer in _answers({**request, "scratch": scratch}, scratch):
            if "done" in answer:
                memory.triton = answer["done"]
            elif "launches" in answer:
                total[answer["arch"]] = answer["launches"]
                memory.answers[answer["arch"]] += []
                progress(answer["arch"], 0, answer["launches"])
            elif "row" in answer:
                arch = answer["row"]["arch"]
                memory.answers[arch].append(answer)
                done[arch] = done.get(arch, 0) + 1
                progress(arch, done[arch], total[arch])
            else:
                memory.answers[answer["arch"]].append(answer)
    for arch in request["archs"]:
        memory.keep(arch)


class _Memory:
    """All answers about an architecture, kept for the next time that the same is asked of the same
    code: then nothing has to be imported."""

    def __init__(
        self, cases: Sequence[Case], options: Options, user_impls: Mapping[str, str]
    ) -> None:
        self.answers: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.triton = machine.versions().get("triton", "")
        # What is to be left in Triton's own cache has to be compiled; of others' code the hash of
        # one file does not tell what it imports.
        ours = all(_target(case, user_impls).startswith("chela_bench.") for case in cases)
        cached = options.cache is not None and not options.keep and ours
        self._folder = options.cache / "whole" if options.cache is not None and cached else None
        tables = sorted((Path(__file__).parents[1] / "kernels").glob("*.json"))
        self._asked = [
            machine.source_sha256(),
            [hashlib.sha256(path.read_bytes()).hexdigest() for path in tables],
            sorted(machine.versions().items()),
            sorted(x for x in os.environ.items() if x[0].startswith(("TRITON_", "LLVM_"))),
            [case.model_dump(mode="json") for case in cases],
            options.processors,
        ]

    def recall(self, arch: str) -> bool:
        path = self._path(arch)
        if path is None:
            return False
        try:
            held = json.loads(path.read_bytes())
            if held["asked"] != json.loads(json.dumps([*self._asked, arch])):
                return False
            for answer in held["answers"]:
                if "row" in answer:
                    _row(answer["row"], [_EXAMPLE], self.triton)
            self.answers[arch] = held["answers"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return False
        return True

    def keep(self, arch: str) -> None:
        """Unless something crashed or hung, which it may not do again."""
        path = self._path(arch)
        rows = [answer["row"] for answer in self.answers[arch] if "row" in answer]
        if path is None or any(row["outcome"] in ("crash", "timeout") for row in rows):
            return
        held = {"asked": [*self._asked, arch], "answers": self.answers[arch]}
        with contextlib.suppress(OSError):  # a full disk costs the next run its time alone
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(held).encode())

    def _path(self, arch: str) -> Path | None:
        if self._folder is None:
            return None
        digest = hashlib.sha256(json.dumps([*self._asked, arch]).encode()).hexdigest()
        return self._folder / f"{digest}.json"


def _target(case: Case, user_impls: Mapping[str, str]) -> str:
    return user_impls.get(case.impl) or get_op(case.op).impl(case.impl).target


_EXAMPLE = Case(op="", impl="", direction="fwd", dtype="fp32", shape={"B": 1, "T": 1})


def _who(case: Case) -> tuple[str, str, str]:
    return case.op, case.impl, case.dtype


def _row(row: dict[str, Any], users: list[Case], triton: str) -> AtlasRow:
    first = users[0]
    asked = {json.dumps(case.config, sort_keys=True): case.config for case in users}
    return AtlasRow.model_validate(
        {
            **row,
            "op": first.op,
            "impl": first.impl,
            "dtype": first.dtype,
            "asked": list(asked.values()),
            "directions": list(dict.fromkeys(case.direction for case in users)),
            "lens": sorted({case.shape["T"] for case in users}),
            "triton": triton,
        }
    )


def _refused(answer: dict[str, Any], cases: Sequence[Case]) -> Refused:
    case = cases[answer["refused"]["case"]]
    return Refused(
        op=case.op, impl=case.impl, arch=answer["arch"], direction=case.direction,
        asked=case.config, tokens=case.shape["T"], reason=answer["refused"]["reason"],
    )  # fmt: skip


def _answers(request: dict[str, Any], scratch: str) -> Iterator[dict[str, Any]]:
    """Of the process that compiles, which ends with the loop."""
    read_fd, write_fd = os.pipe()
    log_path = Path(scratch) / "words"
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TMPDIR": scratch}
    with log_path.open("wb") as log:
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _WORKER, str(write_fd), str(os.getpid())],
                stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=(write_fd,),
                start_new_session=True, env=environment,
            )  # fmt: skip
        except OSError as error:
            os.close(read_fd)
            raise EnvironmentProblem(f"cannot start the compiler's process: {error}") from error
        finally:
            os.close(write_fd)
    finished = False
    try:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.close()
        with os.fdopen(read_fd) as answers:
            for line in answers:
                answer = json.loads(line)
                if "refusal" in answer:
                    refusal = answer["refusal"]
                    kind = EnvironmentProblem if refusal["exit_code"] == 6 else UsageError
                    raise kind(refusal["message"])
                finished = "done" in answer
                yield answer
        process.wait()
        if not finished:
            raise EnvironmentProblem(
                f"the process that compiles ended with exit code {process.returncode}; last "
                f"output: {_last_line(log_path)}"
            )
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _last_line(path: Path) -> str:
    with contextlib.suppress(OSError):
        lines = path.read_text(errors="replace").strip().splitlines()
        if lines:
            return lines[-1][:300]
    return "none"
