"""What `doctor` looks at: versions, driver, cards, tools. Reads only; never starts CUDA here.

What torch alone knows comes from a process of its own, with a time limit: a torch that hangs or
crashes is a finding. NVML's part is imported where it is used, since it may be what is missing.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from chela_bench.errors import EnvironmentProblem

REQUIRED = {  # as pyproject.toml has it; a test holds them equal
    "torch": "2.10",
    "triton": "3.6",
    "pandas": "2.2",
    "pyarrow": "18",
    "matplotlib": "3.9",
    "rich": "13.9",
    "click": "8.1.8",
    "jinja2": "3.1",
    "pydantic": "2.10",
    "nvidia-ml-py": "12.560",
}
NCU_PAGE = "https://developer.nvidia.com/nsight-compute"
COUNTERS_REMEDY = (
    "run as root (in a container: --cap-add=SYS_ADMIN), or have an administrator put "
    "`options nvidia NVreg_RestrictProfilingToAdminUsers=0` in /etc/modprobe.d and "
    "reload the driver: https://developer.nvidia.com/ERR_NVGPUCTRPERM"
)
_MODULES = {"nvidia-ml-py": "pynvml"}  # imported under another name
TORCH_LIMIT_S = 120.0
_TOOL_LIMIT_S = 20.0
_CAP_SYS_ADMIN = 21
_PARAMS = Path("/proc/driver/nvidia/params")

_TORCH_PROBE = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    usable = torch.cuda.is_available()
    gpus = []
    for index in range(torch.cuda.device_count() if usable else 0):
        p = torch.cuda.get_device_properties(index)
        gpus.append({
            "uuid": str(p.uuid),
            "name": p.name,
            "compute_capability": f"{p.major}.{p.minor}",
            "memory_bytes": p.total_memory,
            "sm_count": p.multi_processor_count,
            "smem_per_block_bytes": p.shared_memory_per_block_optin,
            "smem_per_sm_bytes": p.shared_memory_per_multiprocessor,
            "l2_bytes": p.L2_cache_size,
        })
said = [str(w.message) for w in caught if "CUDA" in str(w.message)]
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "usable": usable,
                  "gpus": gpus, "said": " ".join(said) or None}))
"""


@dataclass(frozen=True)
class Torch:
    """What a process that imports torch says; `error` if it could not."""

    error: str | None = None
    version: str | None = None
    cuda: str | None = None  # that it was built for; None: a CPU build
    usable: bool = False  # it can run on a GPU here
    gpus: tuple[Mapping[str, Any], ...] = ()  # in CUDA's order
    said: str | None = None  # its warnings about CUDA


@dataclass(frozen=True)
class Card:
    """A GPU as NVML sees it."""

    uuid: str | None
    name: str | None
    memory_bytes: int | None = None
    ecc: bool | None = None
    mig: bool | None = None
    processes: tuple[str, ...] = ()  # other compute processes on it, as "pid (name)"


@dataclass(frozen=True)
class Ncu:
    path: str
    version: str | None


@dataclass(frozen=True)
class Peer:
    """A module beyond the core dependencies, and who needs it."""

    module: str
    impls: tuple[str, ...]
    install: str
    installed: bool


@dataclass(frozen=True)
class Facts:
    """Everything that the checks are made from."""

    device: str  # "cpu", "cuda" or "cuda:N", as a sweep would take it
    no_gpu: str | None  # why torch cannot use a GPU here; None: it looks as though it can
    forced_cpu: bool = False  # --device cpu was asked for
    python: str = ""
    packages: Mapping[str, str | None] = field(default_factory=dict)  # versions; None: missing
    wanted_triton: str | None = None  # the one that torch pins
    torch: Torch = Torch()
    compiler: str | None = None
    python_headers: bool = True
    driver: str | None = None
    driver_cuda: str | None = None  # newest CUDA version that the driver runs
    nvml_problem: str | None = None
    cards: tuple[Card, ...] = ()
    ncu: Ncu | None = None
    counters_admin_only: bool | None = None  # None: the driver does not tell
    admin: bool = False
    counters_tried: bool = False  # by ncu, on a kernel
    counters_problem: tuple[str, str] | None = None  # what it said then, and the remedy
    gpm_problem: str | None = None  # of the card in use, and what else to take
    energy: bool = False  # whether it counts its energy
    peers: tuple[Peer, ...] = ()
    config: str = ""
    config_problem: str | None = None
    out: str = ""
    out_problem: str | None = None


def collect(
    wanted: str,
    *,
    peers: tuple[Peer, ...],
    config: str,
    config_problem: str | None,
    out: Path,
    torch_limit_s: float = TORCH_LIMIT_S,
) -> Facts:
    """The facts of this machine for `--device wanted`. UsageError if that is no device."""
    ncu = find_ncu()
    facts = Facts(
        forced_cpu=wanted == "cpu",
        python=sys.version.split()[0],
        packages={name: _version(name) for name in REQUIRED},
        wanted_triton=_triton_of_torch(),
        torch=probe_torch(torch_limit_s),
        compiler=_compiler(),
        python_headers=Path(sysconfig.get_path("include"), "Python.h").is_file(),
        ncu=None if ncu is None else Ncu(ncu, ncu_version(ncu)),
        counters_admin_only=counters_admin_only(),
        admin=is_admin(),
        peers=peers,
        config=config,
        config_problem=config_problem,
        out=str(out),
        out_problem=unwritable(out),
        **_gpu_facts(wanted),
    )
    return replace(facts, **_counters(facts))


def card_in_use(facts: Facts) -> Card | None:
    """NVML's card that a sweep would use; matched by UUID, else the only one."""
    if facts.device == "cpu":
        return None
    index = int(facts.device.partition(":")[2] or 0)
    if index < len(facts.torch.gpus):
        bare = facts.torch.gpus[index]["uuid"]
        for card in facts.cards:
            if card.uuid in (f"GPU-{bare}", f"MIG-{bare}"):
                return card
    return facts.cards[0] if len(facts.cards) == 1 else None


def _counters(facts: Facts) -> dict[str, Any]:
    """What counts bytes and energy on the card in use: each is tried."""
    found: dict[str, Any] = {}
    if facts.ncu is not None and facts.ncu.version is not None and facts.torch.usable:
        from chela_bench.profiles import ncu

        if facts.device != "cpu" and at_least(facts.ncu.version, ncu.MINIMUM):
            found["counters_tried"] = True
            found["counters_problem"] = ncu.probe(facts.ncu.path)
    card = card_in_use(facts)
    if card is not None and card.uuid is not None:
        from chela_bench.profiles import gpm, nvml

        found["gpm_problem"] = gpm.problem(card.uuid)
        found["energy"] = nvml.energy_mj(card.uuid) is not None
    return found


def _gpu_facts(wanted: str) -> dict[str, Any]:
    """What NVML tells, and the device that a sweep would take."""
    try:
        from chela_bench.profiles import machine, nvml
    except ModuleNotFoundError as error:  # a core dependency; `packages` says which
        reason = f"{error.name} is not installed"
        return {"device": "cpu" if wanted == "auto" else wanted, "no_gpu": reason}
    try:
        device = machine.choose_device(wanted)
    except EnvironmentProblem:
        device = wanted
    driver, driver_cuda = nvml.driver()
    cards = []
    for card in nvml.cards():
        uuid = card["uuid"] or ""
        more = nvml.facts(uuid)
        processes = tuple(nvml.other_processes(uuid, {os.getpid()}))
        cards.append(Card(**card, ecc=more.get("ecc"), mig=more.get("mig"), processes=processes))
    return {
        "device": device,
        "no_gpu": machine.no_gpu_reason(),
        "driver": driver,
        "driver_cuda": driver_cuda,
        "nvml_problem": nvml.problem(),
        "cards": tuple(cards),
    }


def probe_torch(limit_s: float = TORCH_LIMIT_S) -> Torch:
    """torch's own facts, from a process that imports it and, where it can, starts CUDA."""
    if importlib.util.find_spec("torch") is None:
        return Torch(error="not installed")
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _TORCH_PROBE],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        encoding="utf-8",
        errors="replace",
    )
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the driver: left behind
            process.communicate(timeout=5)
        return Torch(error=f"starting it did not end within {limit_s:g} s")
    if process.returncode == 0:
        with contextlib.suppress(ValueError, IndexError, TypeError):
            found = json.loads(out.splitlines()[-1])
            return Torch(**{**found, "gpus": tuple(found["gpus"])})
    last = next((line.strip() for line in reversed(err.splitlines()) if line.strip()), None)
    return Torch(error=f"starting it {_ending(process.returncode)}" + (f": {last}" if last else ""))


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    with contextlib.suppress(ValueError):
        return f"died of {signal.Signals(-code).name}"
    return f"died of signal {-code}"


def find_ncu() -> str | None:
    """Nsight Compute: on PATH, with the CUDA toolkit, or the newest below /opt."""
    newest_first = sorted(
        Path("/opt/nvidia/nsight-compute").glob("*/ncu"),
        key=lambda path: [int(part) for part in re.findall(r"\d+", path.parent.name)],
        reverse=True,
    )
    for path in (Path("/usr/local/cuda/bin/ncu"), *newest_first):
        found = shutil.which("ncu") or shutil.which(path)
        if found:
            return found
    return None


def at_least(version: str, minimum: str) -> bool:
    """`2.10.0+cu130` is at least `2.10`."""
    return release(version) >= release(minimum)


def release(version: str) -> list[int]:
    """`2.10.0+cu130` is [2, 10, 0]."""
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    return [int(part) for part in numbers[0].split(".")] if numbers else []


def ncu_version(path: str) -> str | None:
    """`2025.3.1.0`; None if it does not say, within a time limit."""
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, encoding="utf-8", errors="replace",
            timeout=_TOOL_LIMIT_S, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"Version (\d[\d.]*)", done.stdout)
    return found[1] if found else None


def counters_admin_only(params: Path = _PARAMS) -> bool | None:
    """Whether the driver keeps performance counters for administrators; None: it does not say."""
    try:
        found = re.search(r"^RmProfilingAdminOnly:\s*(\d+)", params.read_text(), re.MULTILINE)
    except OSError:
        return None
    return bool(int(found[1])) if found else None


def is_admin(status: Path = Path("/proc/self/status")) -> bool:
    """CAP_SYS_ADMIN, which root in a container often lacks."""
    with contextlib.suppress(OSError):
        found = re.search(r"^CapEff:\s*([0-9a-f]+)", status.read_text(), re.MULTILINE)
        if found:
            return bool(int(found[1], 16) >> _CAP_SYS_ADMIN & 1)
    return os.geteuid() == 0


def unwritable(folder: Path) -> str | None:
    """Why nothing can be written below `folder`, which need not exist yet, or None."""
    for path in (folder, *folder.absolute().parents):
        try:
            path.lstat()  # a link that leads nowhere is in the way of a folder
            with tempfile.TemporaryFile(dir=path):
                return None
        except (FileNotFoundError, NotADirectoryError) as error:
            if os.path.lexists(path):
                return f"cannot write to {path}: {error.strerror}"
        except OSError as error:
            return f"cannot write to {path}: {error.strerror}"
    return None


def _version(package: str) -> str | None:
    if importlib.util.find_spec(_MODULES.get(package, package)) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _triton_of_torch() -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for requirement in importlib.metadata.requires("torch") or ():
            if found := re.match(r"(?:pytorch-)?triton\s*\(?==\s*([\w.+]+)", requirement):
                return found[1]
    return None


def _compiler() -> str | None:
    for name in filter(None, (os.environ.get("CC"), "gcc", "clang", "cc")):
        if found := shutil.which(name):
            return found
    return None
