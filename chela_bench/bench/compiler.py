"""The process that compiles for GPUs which are not there: an atlas's worker.

One request comes as JSON on standard input, answers go as JSON lines to the descriptor in the first
argument. For each architecture it forks a process that stands in for one such GPU: that one finds
what the cases would launch (launches.py), looks it up in the cache, and forks again for each kernel
that has to be compiled, since a compiler may crash or hang. The second argument is the parent's id.

    -> {"archs", "cases", "impls", "parallel", "limit_s", "cache", "scratch", "keep"}
    <- {"arch", "launches", "cached"}         <- {"row": {...}, "cases": [...], "place"}
    <- {"arch", "refused": {...}}             <- {"done": triton's version}
    <- {"refusal": {"exit_code", "message"}}
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import pkgutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chela_bench.bench.cases import Case
from chela_bench.errors import ChelaBenchError, EnvironmentProblem
from chela_bench.profiles.forks import (
    Died,
    Ending,
    Hung,
    Raised,
    Returned,
    die_with_parent,
    each_in_a_fork,
)
from chela_bench.profiles.occupancy import Arch, find_arch

CACHE_VERSION = 1  # of what a cached file holds
TILE = ("BLOCK", "N2", "FIRST")  # how the constants begin that a kernel's block sizes are
_ARCH_LIMIT_S = 24 * 3600.0  # each of its kernels has a limit of its own
_SLOW_IMPORTS = ("torch._dynamo",)  # seconds, and only some of a layer's steps need it

Answer = Callable[[dict[str, Any]], None]


def main() -> None:
    answer_fd, parent_pid = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def answer(message: dict[str, Any]) -> None:
        data = (json.dumps(message) + "\n").encode()
        while data:
            data = data[os.write(answer_fd, data) :]

    request = json.loads(sys.stdin.readline())
    try:
        _import_all(request)
        import triton

        for name in request["archs"]:
            for module in _compile_for(find_arch(name), request, answer):
                importlib.import_module(module)
        answer({"done": triton.__version__})
    except ChelaBenchError as error:
        answer({"refusal": {"exit_code": error.exit_code, "message": str(error)}})


def _import_all(request: dict[str, Any]) -> None:
    """Once, before forking."""
    import chela_bench.kernels
    from chela_bench.bench.load import load

    importlib.import_module("chela_bench.bench.launches")
    for module in pkgutil.iter_modules(chela_bench.kernels.__path__):
        importlib.import_module(f"chela_bench.kernels.{module.name}")
    for target in request["impls"].values():
        load(target)


def _compile_for(arch: Arch, request: dict[str, Any], answer: Answer) -> list[str]:
    """In a fork: a process can stand in for one GPU alone. Returns what it had to import."""
    jobs = [lambda: _Atlas(arch, request, answer).run()]
    imported: list[str] = []
    for _, ending in each_in_a_fork(jobs, parallel=1, limit_s=_ARCH_LIMIT_S):
        if isinstance(ending, Died | Hung):  # a host function of the user's, at worst
            raise EnvironmentProblem(f"finding what is launched on {arch.name} failed: {ending}")
        if isinstance(ending, Raised):
            raise RuntimeError(f"{arch.name}: {ending}")
        imported = ending.value
    return imported


class _Atlas:
    """All cases on one architecture."""

    def __init__(self, arch: Arch, request: dict[str, Any], answer: Answer) -> None:
        self._arch, self._request, self._answer = arch, request, answer
        self._cases = [Case.model_validate(case) for case in request["cases"]]

    def run(self) -> list[str]:
        launches, users = self._recorded()
        cache = Cache(self._request["cache"])
        keys = [cache.key(key) for key in launches]
        found = list(launches.values())
        known = [cache.read(key) for key in keys]
        waiting = [i for i, facts in enumerate(known) if facts is None]
        self._answer(
            {
                "arch": self._arch.name,
                "launches": len(launches),
                "cached": len(launches) - len(waiting),
            }
        )
        for i, facts in enumerate(known):
            if facts is not None:
                self._tell(i, found[i], users[i], facts)
        if waiting:
            _before_compiling()
        endings = each_in_a_fork(
            [self._compiling(found[i]) for i in waiting],
            parallel=self._request["parallel"],
            limit_s=self._request["limit_s"],
        )
        for place, ending in endings:
            i = waiting[place]
            facts = _facts(ending)
            if facts["outcome"] in ("ok", "compile_error"):  # others may not happen again
                cache.write(keys[i], facts)
            self._tell(i, found[i], users[i], facts)
        return [name for name in _SLOW_IMPORTS if name in sys.modules]

    def _recorded(self) -> tuple[dict[str, Any], list[list[int]]]:
        """Every kernel and specialisation once, by its key, and the cases that launch it."""
        from triton.backends.compiler import GPUTarget

        from chela_bench.bench.launches import Recorder
        from chela_bench.bench.ops import user_impl

        arch = self._arch
        target = GPUTarget(arch.backend, arch.capability or arch.name, arch.warp_size)
        recorder = Recorder(target, self._request["processors"] or arch.processors)
        launches: dict[str, Any] = {}
        users: dict[str, list[int]] = {}
        for i, case in enumerate(self._cases):
            target_of_user = self._request["impls"].get(case.impl)
            impl = user_impl(case.impl, target_of_user) if target_of_user else None
            try:
                found = {launch.key: launch for launch in recorder.launches(case, impl)}
            except Exception as error:  # a configuration that it does not take, a user's mistake
                text = f"{type(error).__name__}: {error}"
                if isinstance(error, ChelaBenchError):
                    text = str(error)
                self._answer({"arch": arch.name, "refused": {"case": i, "reason": text}})
                continue
            if not found:
                reason = "it launches no Triton kernel"
                self._answer({"arch": arch.name, "refused": {"case": i, "reason": reason}})
            for key, launch in found.items():
                launches.setdefault(key, launch)
                users.setdefault(key, []).append(i)
        return launches, list(users.values())

    def _compiling(self, launch: Any) -> Callable[[], dict[str, Any]]:
        def compile_it() -> dict[str, Any]:
            from chela_bench.profiles.static import compile_kernel

            if self._request["keep"]:  # where a launch of it will look
                return compile_kernel(launch.source, launch.target, launch.options, self._arch)
            with tempfile.TemporaryDirectory(dir=self._request["scratch"]) as folder:
                os.environ["TRITON_CACHE_DIR"] = folder
                return compile_kernel(launch.source, launch.target, launch.options, self._arch)

        return compile_it

    def _tell(self, place: int, launch: Any, cases: list[int], facts: dict[str, Any]) -> None:
        from chela_bench.profiles.static import judged

        if facts["outcome"] == "ok":
            facts = judged(facts, self._arch)
        row = {**self.description(launch, cases), "arch": self._arch.name, **facts}
        self._answer({"row": row, "cases": cases, "place": place})

    def description(self, launch: Any, cases: list[int]) -> dict[str, Any]:
        """What is compiled, as its row says it."""
        constants = {name: _plain(value) for name, value in launch.constants.items()}
        axes = {name for i in cases for name in self._cases[i].config}
        tile = {name: x for name, x in constants.items() if name.startswith(TILE) or name in axes}
        config = {name: x for name, x in tile.items() if isinstance(x, int | str)}
        config |= {name: launch.options[name] for name in ("num_warps", "num_stages")}
        return {
            "kernel": launch.kernel,
            "language": "gluon" if launch.is_gluon else "triton",
            "config": config,
            "constants": constants,
            "types": launch.types,
        }


def _before_compiling() -> None:
    """What every compile would find out for itself: a hash of all of Triton."""
    with contextlib.suppress(ImportError):  # not Triton's public interface; it saves a second each
        from triton.runtime.cache import triton_key

        triton_key()


def _facts(ending: Ending) -> dict[str, Any]:
    """What is known of a compile, however it ended; whether it fits is said later."""
    if isinstance(ending, Returned):
        return {**ending.value, "outcome": "ok"}
    if isinstance(ending, Raised):
        reason = f"{ending.kind}: {_first_line(ending.message)}"
        return {"outcome": "compile_error", "fits": False, "reason": reason}
    if isinstance(ending, Hung):
        reason = f"the compiler took longer than {ending.limit_s:g} s"
        return {"outcome": "timeout", "fits": False, "reason": reason}
    assert isinstance(ending, Died)
    return {"outcome": "crash", "fits": False, "reason": f"the compiler was {ending.reason}"}


def _first_line(text: str) -> str:
    """Of a compiler's message the line that says what is wrong: the last that is not source."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if not set(line) <= set("^~ ")]
    return (said[-1] if said else text)[:300]


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | bool | None) else str(value)


class Cache:
    """Facts of compiled kernels on disk, by all that they depend on; a file each, written whole."""

    def __init__(self, folder: str | None) -> None:
        self._folder = None if folder is None else Path(folder)

    def key(self, launch: str) -> str:
        """Of the source with all that it calls, types, constants, alignment, options, target,
        Triton's version, and the settings of the environment that Triton's own cache minds."""
        import triton
        from triton._C.libtriton import get_cache_invalidating_env_vars

        parts = [
            CACHE_VERSION,
            triton.__version__,
            launch,
            sorted(get_cache_invalidating_env_vars().items()),
            [os.environ.get(name) for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")],
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def read(self, key: str) -> dict[str, Any] | None:
        """None if there is none, or none that can be read."""
        path = self._path(key)
        if path is None:
            return None
        try:
            held = json.loads(path.read_bytes())
            facts: dict[str, Any] = held["facts"]
            whole = held["key"] == key and facts["outcome"] in ("ok", "compile_error")
            if facts["outcome"] == "ok":
                whole = whole and all(isinstance(facts[name], int) for name in _ALWAYS)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return facts if whole else None

    def write(self, key: str, facts: dict[str, Any]) -> None:
        """A disk that is full costs the next run its time, and this one nothing."""
        from chela_bench.bench.store import write_atomically

        path = self._path(key)
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps({"key": key, "facts": facts}).encode())
        except OSError as error:
            print(f"{path} is not written: {error.strerror}", file=sys.stderr)

    def _path(self, key: str) -> Path | None:
        return None if self._folder is None else self._folder / key[:2] / f"{key}.json"


_ALWAYS = ("smem_bytes", "num_warps", "tmem_columns", "instructions", "compile_ms")
