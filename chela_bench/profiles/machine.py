"""Facts of the machine: device, versions, what is visible. `guess_device` needs no torch."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import runpy
from pathlib import Path
from typing import Any

from chela_bench import __version__
from chela_bench.errors import EnvironmentProblem, UsageError
from chela_bench.profiles import nvml
from chela_bench.records import Environment

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "pandas",
    "matplotlib",
    "pydantic",
    "nvidia-ml-py",
    "flash-linear-attention",
    "fla-core",
)


def torch_cuda_version() -> str | None:
    """The CUDA version that the installed torch was built for, read without importing torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        version = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    except OSError:  # half an installation
        return None
    found: str | None = version.get("cuda")
    return found


def no_gpu_reason() -> str | None:
    """Why torch cannot use a GPU here, or None if it looks as though it can."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    if torch_cuda_version() is None:
        return "the installed torch is a CPU build"
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides every GPU"
    if nvml.gpu_count() == 0:
        return "the NVIDIA driver reports no GPU"
    return None


def choose_device(wanted: str) -> str:
    """ "auto" becomes "cuda" or "cpu"; "cuda" and "cuda:N" are refused where there is no GPU."""
    if wanted == "cpu":
        return wanted
    reason = no_gpu_reason()
    if wanted == "auto":
        return "cpu" if reason else "cuda"
    if not re.fullmatch(r"cuda(:[0-9]{1,3})?", wanted):
        raise UsageError(f"--device takes auto, cpu, cuda or cuda:N; got {wanted!r}")
    if reason:
        raise EnvironmentProblem(f"--device {wanted} needs a GPU, but {reason}; use --device cpu")
    return wanted


def choose_gpus(text: str) -> list[str]:
    """`0,1` or `all` becomes ["cuda:0", "cuda:1"]: as torch counts, CUDA_VISIBLE_DEVICES heeded."""
    reason = no_gpu_reason()
    if reason:
        raise EnvironmentProblem(f"--gpus {text} needs a GPU, but {reason}; use --device cpu")
    if text.strip() == "all":
        return [f"cuda:{index}" for index in range(_visible_gpus())]
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,3}", part) for part in parts):
        raise UsageError(f"--gpus takes all, or numbers as in 0,1; got {text!r}")
    return [f"cuda:{index}" for index in dict.fromkeys(map(int, parts))]


def _visible_gpus() -> int:
    """How many of the driver's GPUs CUDA_VISIBLE_DEVICES leaves."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = nvml.gpu_count()
    return there if visible is None else min(there, len(visible.split(",")))


def environment(device: str) -> Environment:
    """The Environment record of a resolved device. Starts CUDA if the device is a GPU."""
    common: dict[str, Any] = {
        "cpu": cpu_name(),
        "cpu_threads": os.cpu_count() or 1,
        "os": platform.platform(),
        "python": platform.python_version(),
    }
    if device == "cpu":
        return Environment(device="cpu", name=common["cpu"], **common)
    import torch

    if not torch.cuda.is_available():
        raise EnvironmentProblem(f"device {device} wanted, but torch finds no usable GPU")
    index = torch.device(device).index or 0
    if index >= torch.cuda.device_count():
        raise EnvironmentProblem(
            f"device {device} wanted, but torch sees {torch.cuda.device_count()} GPU(s): "
            f"cuda:0 to cuda:{torch.cuda.device_count() - 1}"
        )
    properties: Any = torch.cuda.get_device_properties(index)
    uuid = nvml.uuid_of(str(properties.uuid))
    return Environment(
        device="cuda",
        name=properties.name,
        uuid=uuid,
        compute_capability=f"{properties.major}.{properties.minor}",
        sm_count=properties.multi_processor_count,
        memory_bytes=properties.total_memory,
        l2_bytes=properties.L2_cache_size,
        smem_per_block_bytes=properties.shared_memory_per_block_optin,
        smem_per_sm_bytes=properties.shared_memory_per_multiprocessor,
        cuda=torch.version.cuda,
        **nvml.facts(uuid),
        **common,
    )


def versions() -> dict[str, str]:
    """Installed versions of the tools and peers that a figure depends on."""
    found = {"chela-bench": __version__, "python": platform.python_version()}
    found["TRITON_DEFAULT_FP_FUSION"] = os.environ.get("TRITON_DEFAULT_FP_FUSION", "unset")
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def source_sha256() -> str:
    """One hash over the package's own Python files: which code measured, in a checkout or not."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
