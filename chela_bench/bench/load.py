"""Imports a function by name: "package.module:function" or "path/to/file.py:function"."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from chela_bench.errors import UsageError


@functools.cache
def load(target: str) -> Any:
    """The object `target` names. A file's own exceptions become a UsageError that quotes them."""
    module_name, _, name = target.rpartition(":")
    if module_name.endswith(".py"):
        module = _module_from_file(Path(module_name))
    else:
        module = importlib.import_module(module_name)
    try:
        return getattr(module, name)
    except AttributeError:
        public = [n for n in dir(module) if callable(getattr(module, n)) and not n.startswith("_")]
        raise UsageError(
            f"no function {name!r} in {module_name}; it has: {', '.join(public) or 'none'}"
        ) from None


def _module_from_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"chela_bench_user_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UsageError(f"no Python file at {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and Triton look their module up by name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"{path} does not import: {type(error).__name__}: {error}") from error
    return module
