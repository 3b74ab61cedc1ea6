"""What lies at a path: what the system does not tell is an error in one line."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from chela_bench.errors import ChelaBenchError, RecordError

Raised = type[ChelaBenchError]


def exists(path: Path, raised: Raised = RecordError) -> bool:
    return _mode(path, raised) is not None


def is_dir(path: Path, raised: Raised = RecordError) -> bool:
    return stat.S_ISDIR(_mode(path, raised) or 0)


def is_file(path: Path, raised: Raised = RecordError) -> bool:
    return stat.S_ISREG(_mode(path, raised) or 0)


def folders(folder: Path, raised: Raised = RecordError) -> list[Path]:
    """Those in it by name; a link that leads nowhere is none."""
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        raise _unreadable(folder, error, raised) from error


def real_name(folder: Path) -> str:
    """A folder's own name where the path ends in a link or a dot; a loop keeps its own."""
    return Path(os.path.realpath(folder)).name


def make_folder(folder: Path) -> None:
    """Raises OSError, and says so where something else is in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        wanted = f"{folder} is no folder, and a folder was wanted"
        raise NotADirectoryError(errno.ENOTDIR, wanted) from None


def _mode(path: Path, raised: Raised) -> int | None:
    """None: nothing is there."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unreadable(path, error, raised) from error


def _unreadable(path: Path, error: OSError, raised: Raised) -> ChelaBenchError:
    return raised(f"cannot read {path}: {error.strerror}")
