"""What stands in the way of a sweep on this machine, each with its remedy. Pure: facts in.

"problem" is what stops the main job, "warning" what makes it do less or measure worse. A plain
fact is "ok".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from chela_bench.profiles.inventory import (
    COUNTERS_REMEDY,
    NCU_PAGE,
    REQUIRED,
    Facts,
    at_least,
    card_in_use,
    release,
)
from chela_bench.profiles.ncu import MINIMUM as OLDEST_NCU

State = Literal["ok", "warning", "problem"]
PYTHON = "3.11"
TORCH_PAGE = "https://pytorch.org/get-started/locally"


@dataclass(frozen=True)
class Check:
    name: str
    state: State
    found: str
    remedy: str | None = None  # only if not ok


def can_run(checks: Iterable[Check]) -> bool:
    """Whether `chela-bench sweep` can run on the device in question."""
    return all(check.state != "problem" for check in checks)


def examine(facts: Facts) -> list[Check]:
    """The checks, from the interpreter outwards."""
    return [
        *_python(facts),
        *_torch(facts),
        *_triton(facts),
        *_compiler(facts),
        *_driver(facts),
        *_gpu(facts),
        *_card(facts),
        *_ncu(facts),
        *_peers(facts),
        *_files(facts),
    ]


def _pip(package: str) -> str:
    return f"pip install '{package}>={REQUIRED[package]}'"


def _python(facts: Facts) -> Iterator[Check]:
    if at_least(facts.python, PYTHON):
        yield Check("Python", "ok", facts.python)
    else:
        found = f"{facts.python}; {PYTHON} or later is needed"
        yield Check("Python", "problem", found, "make the environment with a later Python")
    others = {name: v for name, v in facts.packages.items() if name not in ("torch", "triton")}
    wrong = {
        name: "is not installed" if version is None else f"{version} is older than {REQUIRED[name]}"
        for name, version in others.items()
        if version is None or not at_least(version, REQUIRED[name])
    }
    if wrong:
        wanted = " ".join(f"'{name}>={REQUIRED[name]}'" for name in wrong)
        found = "; ".join(f"{name} {what}" for name, what in wrong.items())
        yield Check("packages", "problem", found, f"pip install {wanted}")
    else:
        yield Check("packages", "ok", ", ".join(f"{name} {v}" for name, v in others.items()))


def _torch(facts: Facts) -> Iterator[Check]:
    torch, installed = facts.torch, facts.packages.get("torch")
    if torch.version is None and installed is None:
        yield Check("torch", "problem", torch.error or "not installed", _pip("torch"))
    elif torch.version is None:
        again = f"pip install --force-reinstall torch, or see {TORCH_PAGE}"
        yield Check("torch", "problem", f"{installed}; {torch.error}", again)
    elif not at_least(torch.version, REQUIRED["torch"]):
        found = f"{torch.version}; {REQUIRED['torch']} or later is needed"
        yield Check("torch", "problem", found, _pip("torch"))
    else:
        build = f"for CUDA {torch.cuda}" if torch.cuda else "a CPU build"
        yield Check("torch", "ok", f"{torch.version}, {build}")


def _triton(facts: Facts) -> Iterator[Check]:
    version, wanted = facts.packages.get("triton"), facts.wanted_triton
    remedy = f"pip install 'triton=={wanted}'" if wanted else _pip("triton")
    if version is None:
        yield Check("triton", "problem", "not installed", remedy)
    elif not at_least(version, REQUIRED["triton"]):
        found = f"{version}; {REQUIRED['triton']} or later is needed"
        yield Check("triton", "problem", found, remedy)
    elif wanted and release(version) != release(wanted):
        yield Check("triton", "warning", f"{version}; this torch wants {wanted}", remedy)
    else:
        yield Check("triton", "ok", version)


def _compiler(facts: Facts) -> Iterator[Check]:
    fails = "Triton kernels and torch.compile cannot build"
    if facts.compiler is None:
        yield Check(
            "compiler", "warning", f"none: {fails}", "install gcc, or name a C compiler in CC"
        )
    elif not facts.python_headers:
        yield Check(
            "compiler",
            "warning",
            f"{facts.compiler}, without Python.h: {fails}",
            "install Python's headers (python3-dev, python3-devel)",
        )
    else:
        yield Check("compiler", "ok", facts.compiler)


def _driver(facts: Facts) -> Iterator[Check]:
    if facts.nvml_problem is None and facts.driver is not None:
        newest = f", runs CUDA up to {facts.driver_cuda}" if facts.driver_cuda else ""
        yield Check("driver", "ok", facts.driver + newest)
        built = facts.torch.cuda
        if built and facts.driver_cuda and release(built)[:1] > release(facts.driver_cuda)[:1]:
            yield Check(
                "CUDA",
                "warning",
                f"torch is built for {built}, the driver runs {facts.driver_cuda}",
                f"update the driver, or install a torch for CUDA {facts.driver_cuda}: {TORCH_PAGE}",
            )
        else:
            yield Check("CUDA", "ok", built or "none in this torch")
        yield Check("NVML", "ok", f"{len(facts.cards)} GPU{'s' * (len(facts.cards) != 1)}")
    elif facts.nvml_problem is None:
        yield Check("driver", "ok", "none")
    else:
        yield Check(
            "driver",
            "warning",
            f"NVML does not start: {facts.nvml_problem}",
            "run nvidia-smi; after a driver update, reboot or reload the driver",
        )


def _gpu(facts: Facts) -> Iterator[Check]:
    """The card that torch would use; what stops it where a sweep would take a GPU."""
    names = ", ".join(card.name or "unknown" for card in facts.cards)
    torch, reason = facts.torch, facts.no_gpu
    if facts.device == "cpu":
        if facts.forced_cpu or not facts.cards:
            unused = f"{names}, unused with --device cpu" if names else f"none: {reason}"
            yield Check("GPU", "ok", unused)
        else:
            yield Check("GPU", "warning", f"{names}, unused: {reason}", _way_to_a_gpu(facts))
        return
    if reason:
        yield Check("GPU", "problem", reason, f"{_way_to_a_gpu(facts)}, or use --device cpu")
        return
    if torch.error:
        yield Check("GPU", "warning", f"{names}; torch cannot say more", "repair torch first")
        return
    if not torch.usable:
        found = f"{names}: torch finds no usable GPU" + (f": {torch.said}" if torch.said else "")
        yield Check("GPU", "problem", found, "run nvidia-smi and repair that, or use --device cpu")
        return
    index = _index(facts)
    if index >= len(torch.gpus):
        last = len(torch.gpus) - 1
        yield Check(
            "GPU",
            "problem",
            f"no cuda:{index}: torch sees {len(torch.gpus)}",
            "use --device cuda:0" + (f" to cuda:{last}" if last else ""),
        )
        return
    gpu = torch.gpus[index]
    memory = gpu["memory_bytes"] / 2**30
    found = f"{gpu['name']}, {memory:.1f} GiB, cuda:{index} of {len(torch.gpus)}, GPU-{gpu['uuid']}"
    if torch.said:
        way_out = f"install a torch for this card: {TORCH_PAGE}"
        yield Check("GPU", "warning", f"{found}; torch says: {torch.said}", way_out)
    else:
        yield Check("GPU", "ok", found)
    yield Check("SM", "ok", f"{gpu['sm_count']}, compute capability {gpu['compute_capability']}")
    block, sm = (gpu[f"smem_per_{unit}_bytes"] / 1024 for unit in ("block", "sm"))
    yield Check("SRAM", "ok", f"{block:g} KiB a block, {sm:g} KiB an SM")
    yield Check("L2", "ok", f"{gpu['l2_bytes'] / 2**20:g} MiB")


def _way_to_a_gpu(facts: Facts) -> str:
    reason = facts.no_gpu or ""
    if "CPU build" in reason:
        return f"install a torch for CUDA: {TORCH_PAGE}"
    if "CUDA_VISIBLE_DEVICES" in reason:
        return "unset CUDA_VISIBLE_DEVICES"
    if "driver" in reason:
        return "install NVIDIA's driver, and give a container its GPU (docker run --gpus all)"
    return "install what is missing"


def _index(facts: Facts) -> int:
    return int(facts.device.partition(":")[2] or 0)


def _card(facts: Facts) -> Iterator[Check]:
    card = card_in_use(facts)
    if card is None:
        if facts.cards and facts.device != "cpu":
            yield Check(
                "card",
                "warning",
                "NVML knows none by torch's UUID: clocks, power and other processes stay unknown",
                "measure on a whole card that the driver shows: nvidia-smi -L",
            )
        return
    if card.ecc is False:
        yield Check(
            "ECC",
            "warning",
            "off: bandwidth and memory differ from a card that has it on",
            "compare with runs without ECC alone, or have it switched on: nvidia-smi -e 1, reboot",
        )
    else:
        yield Check("ECC", "ok", "on" if card.ecc else "this card has none")
    if card.mig:
        yield Check(
            "MIG",
            "warning",
            "on: a slice is measured, and NVML tells neither its clocks nor its power",
            "measure on a whole card, or have it switched off: nvidia-smi -mig 0",
        )
    else:
        yield Check("MIG", "ok", "this card has none" if card.mig is None else "off")
    if card.processes:
        yield Check(
            "processes",
            "warning",
            f"others on the card disturb the times: {', '.join(card.processes)}",
            "let them end, or take a free card: --device cuda:N",
        )
    else:
        yield Check("processes", "ok", "no others on the card")


def _ncu(facts: Facts) -> Iterator[Check]:
    """Where HBM bytes can come from: counted by ncu, by GPM, or modelled."""
    on_gpu = facts.device != "cpu"
    version = None if facts.ncu is None else facts.ncu.version
    if facts.ncu is None:
        if on_gpu:
            found = "not found: chela-bench profile and sweep --hbm ncu need it"
            yield Check("ncu", "warning", found, f"install it: {NCU_PAGE}")
        else:
            yield Check("ncu", "ok", "not found; only a GPU needs it")
    elif version is None:
        found = f"{facts.ncu.path} does not tell its version"
        yield Check("ncu", "warning" if on_gpu else "ok", found, _if(on_gpu, _new_ncu()))
    elif not at_least(version, OLDEST_NCU):
        found = f"{version}, {facts.ncu.path}; {OLDEST_NCU} or later is needed"
        yield Check("ncu", "warning" if on_gpu else "ok", found, _if(on_gpu, _new_ncu()))
    else:
        yield Check("ncu", "ok", f"{version}, {facts.ncu.path}")
    if on_gpu and facts.ncu is not None:
        yield _counters(facts)
    if on_gpu and card_in_use(facts) is not None:
        yield from _nvml_counters(facts)


def _counters(facts: Facts) -> Check:
    """As tried; untried, as the driver says."""
    if facts.counters_problem is not None:
        what, remedy = facts.counters_problem
        return Check("counters", "warning", what, remedy)
    if facts.counters_tried:
        return Check("counters", "ok", "permitted: ncu has just counted a kernel's bytes")
    if facts.counters_admin_only and not facts.admin:
        found = "for administrators alone: ncu will say ERR_NVGPUCTRPERM"
        return Check("counters", "warning", found, COUNTERS_REMEDY)
    allowed = facts.admin or facts.counters_admin_only is False
    said = "permitted, as the driver says" if allowed else "the driver does not say who may"
    return Check("counters", "ok", f"{said}; not tried")


def _nvml_counters(facts: Facts) -> Iterator[Check]:
    if facts.gpm_problem is None:
        yield Check("GPM", "ok", "tells HBM bytes of long loops: sweep --hbm gpm")
    else:
        what, _, remedy = facts.gpm_problem.partition("; ")
        yield Check("GPM", "warning", what, remedy)
    if facts.energy:
        yield Check("energy", "ok", "the card counts it: sweep --energy")
    else:
        found = "this card does not count it: sweep --energy stays empty"
        yield Check("energy", "warning", found, "measure on a whole card of Volta or later")


def _new_ncu() -> str:
    return f"install {OLDEST_NCU} or later: {NCU_PAGE}"


def _if(so: bool, remedy: str) -> str | None:
    return remedy if so else None


def _peers(facts: Facts) -> Iterator[Check]:
    for peer in facts.peers:
        users = ", ".join(peer.impls)
        if peer.installed:
            yield Check("peers", "ok", f"{peer.module}, for {users}")
        else:
            found = f"{peer.module} is not installed: {users} will be skipped"
            yield Check("peers", "warning", found, peer.install)


def _files(facts: Facts) -> Iterator[Check]:
    if facts.config_problem:
        way_out = "correct it, or give another with --config"
        yield Check("bench.toml", "problem", facts.config_problem, way_out)
    else:
        yield Check("bench.toml", "ok", facts.config)
    if facts.out_problem:
        yield Check("run folder", "problem", facts.out_problem, "give another with --out")
    else:
        yield Check("run folder", "ok", f"{facts.out} can be written")
