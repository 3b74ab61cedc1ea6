"""Imports a function by name: "package.module:function" or "path/to/file.py:function"."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chela_bench.errors import RecordError, UsageError


@functools.cache
def load(target: str) -> Any:
    """The object `target` names. A file's own exceptions become a UsageError that quotes them."""
    module_name, _, name = target.rpartition(":")
    if module_name.endswith(".py"):
        module = _module_from_file(Path(module_name))
    else:
        module = importlib.import_module(module_name)
    found = getattr(module, name, None)
    if not callable(found):
        public = [n for n in dir(module) if callable(getattr(module, n)) and not n.startswith("_")]
        raise UsageError(
            f"no function {name!r} in {module_name}; it has: {', '.join(public) or 'none'}"
        )
    return found


def is_file(path: Path) -> bool:
    """False as well where the system does not look: a name too long, a folder that is closed."""
    try:
        return path.is_file()
    except OSError:
        return False


def sha256_of_files(targets: Mapping[str, str]) -> dict[str, str]:
    """By the same names, the digest of each target's file."""
    digests = {}
    for name, target in targets.items():
        path = Path(target.rpartition(":")[0])
        try:
            digests[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from error
    return digests


def refuse_changed_files(targets: Mapping[str, str], digests: Mapping[str, str]) -> None:
    """Raises RecordError if a target's file is gone or not what it was when `digests` were made."""
    for name, digest in sha256_of_files(targets).items():
        if digest != digests.get(name):
            raise RecordError(f"{name} has changed since the run began; start a new run instead")


def _module_from_file(path: Path) -> Any:
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]  # two files may share a name
    spec = importlib.util.spec_from_file_location(f"{path.stem}_{digest}", path)
    if spec is None or spec.loader is None or not is_file(path):
        raise UsageError(f"no Python file at {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and Triton look their module up by name
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # what lies beside the file, as `python file.py` has it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UsageError(f"{path} does not import: {type(error).__name__}: {error}") from error
    return module
