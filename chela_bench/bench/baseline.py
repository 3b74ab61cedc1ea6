"""Baselines: records that somebody chose, kept by machine, and moved by nobody else.

    DIR/<machine>/<name>/      baseline.json (what, when, SHA-256 of each file) and the records
    DIR/<machine>/current.json the promoted one's name
    DIR/noise/<device>.json    what `noise` measured on one device

<machine> is GPU model, driver's major version, torch and Triton: with another of these, times and
compiled kernels are others, and a baseline of its own is wanted.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from chela_bench.bench import paths, sources, store
from chela_bench.bench.cases import Case
from chela_bench.bench.runner import utc_now
from chela_bench.bench.sources import Kind, Machine, Measured
from chela_bench.errors import BaselineProblem, ChelaBenchError, EnvironmentProblem, UsageError
from chela_bench.records import Modelled

SCHEMA_VERSION = 1
HEADER, CURRENT, MODELS = "baseline.json", "current.json", "models.json"
NOISE = "noise"
_RUN_FILES = (store.RUN, store.POINTS, store.SAMPLES)
_JSON_FILE: dict[Kind, str] = {"pytest": "pytest.json", "static": "atlas.json"}
_FILES: dict[Kind, tuple[str, ...]] = {
    "run": _RUN_FILES,
    "pytest": (_JSON_FILE["pytest"],),
    "static": (_JSON_FILE["static"], MODELS),
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")


class Kept(BaseModel):
    """A JSON file in a folder of baselines."""

    model_config = ConfigDict(
        extra="ignore", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
    way_out: ClassVar[str] = "save the baseline anew"


_R = TypeVar("_R", bound=Kept)


class Header(Kept):
    """baseline.json."""

    schema_version: int = SCHEMA_VERSION
    """Version of this schema; others are refused."""
    name: str
    """The baseline's name in its machine's folder."""
    kind: Kind
    """run: a run folder's records; pytest: pytest-benchmark's JSON; static: `atlas --json`."""
    saved_utc: str
    """ISO 8601."""
    source: str
    """What was saved."""
    machine: dict[str, str]
    """Device, name, UUID, driver, torch and Triton, as far as known."""
    files: dict[str, str]
    """SHA-256 of each file beside it."""


class Current(Kept):
    """current.json: the promoted baseline."""

    way_out = "promote a baseline: chela-bench baseline promote NAME"

    name: str
    """Its name."""
    promoted_utc: str
    """ISO 8601."""


class ModelledPoint(Kept):
    """One line of models.json."""

    case: Case
    """What moves the bytes."""
    model_bytes: Modelled
    """HBM bytes by its formula."""


@dataclass(frozen=True)
class Listed:
    """One baseline of a folder, or why it cannot be read."""

    key: str
    name: str
    current: bool
    header: Header | None
    problem: str | None


def machine_key(machine: Machine) -> str:
    """The name of a machine's folder."""
    driver = machine.driver_major
    parts = [
        machine.name,
        driver and f"driver-{driver}",
        machine.torch and f"torch-{machine.torch}",
        machine.triton and f"triton-{machine.triton}",
    ]
    return "_".join(slug(part) for part in parts if part)


def save(
    source: Path, folder: Path, name: str | None, models: Mapping[str, tuple[Case, int]]
) -> tuple[str, str]:
    """Copies the records of `source` in; returns (machine key, name). Promotes nothing.

    `models` are kept with compiled kernels.
    """
    measured = sources.read(source)
    if not measured.has_figures:
        raise UsageError(f"{source} holds nothing to keep: no point of it has a figure")
    name = name or re.sub(r"[^A-Za-z0-9]", "", utc_now()[:19]) + f"-{measured.kind}"
    if not _NAME.fullmatch(name):
        raise UsageError(f"a baseline's name takes letters, digits and ._+-; got {name!r}")
    if name == CURRENT:
        raise UsageError(f"{CURRENT} is the file that names the promoted one; give another name")
    if measured.cut_off is not None:
        raise UsageError(f"{source} was cut off: {measured.cut_off}")
    key = machine_key(measured.machine)
    target = folder / key / name
    if paths.exists(target, EnvironmentProblem):
        raise UsageError(f"{target} is there already: a baseline never changes; give another name")
    try:
        paths.make_folder(target.parent)
        half = Path(tempfile.mkdtemp(dir=target.parent, prefix=".saving-"))
        try:
            files = _copy(source, measured, half, models)
            header = Header(
                name=name,
                kind=measured.kind,
                saved_utc=utc_now(),
                source=_writable(str(source)),
                machine=facts(measured.machine),
                files={file: _sha256(half / file) for file in files},
            )
            store.write_atomically(half / HEADER, header.model_dump_json(indent=2).encode() + b"\n")
            half.chmod(0o755)
            half.rename(target)
        finally:
            shutil.rmtree(half, ignore_errors=True)
    except OSError as error:
        raise EnvironmentProblem(f"cannot write {target}: {error.strerror}") from error
    return key, name


def _copy(
    source: Path, measured: Measured, half: Path, models: Mapping[str, tuple[Case, int]]
) -> list[str]:
    if measured.kind == "run":
        files = [file for file in _RUN_FILES if paths.exists(source / file)]
        for file in files:
            shutil.copyfile(source / file, half / file)
        return files
    files = [_JSON_FILE[measured.kind]]
    shutil.copyfile(source, half / files[0])
    if measured.kind == "static" and models:
        rows = [
            ModelledPoint(case=case, model_bytes=size).model_dump_json()
            for case, size in models.values()
        ]
        (half / MODELS).write_text("".join(f"{row}\n" for row in rows))
        files.append(MODELS)
    return files


def promote(folder: Path, name: str, key: str | None = None) -> str:
    """Makes `name` the one that `gate` takes for its machine; returns the machine's key."""
    found = [one for one in listed(folder) if one.name == name and key in (None, one.key)]
    if not found:
        names = ", ".join(one.name for one in listed(folder)) or "none"
        raise BaselineProblem(f"no baseline {name!r} in {folder}; there are: {names}")
    if len(found) > 1:
        keys = ", ".join(one.key for one in found)
        raise UsageError(f"{name!r} is there for several machines; choose with --machine: {keys}")
    [one] = found
    _load(folder / one.key / name)
    current = Current(name=name, promoted_utc=utc_now())
    try:
        store.write_atomically(
            folder / one.key / CURRENT, current.model_dump_json(indent=2).encode() + b"\n"
        )
    except OSError as error:
        raise EnvironmentProblem(f"cannot write {folder / one.key}: {error.strerror}") from error
    return one.key


def listed(folder: Path) -> list[Listed]:
    """Every baseline of the folder, by machine and name."""
    if not paths.is_dir(folder, BaselineProblem):
        raise BaselineProblem(
            f"no folder of baselines at {folder}; `chela-bench baseline save` makes one"
        )
    found = []
    for machine in paths.folders(folder, BaselineProblem):
        kept = [p for p in paths.folders(machine, BaselineProblem) if not p.name.startswith(".")]
        if not _is_a_machines(machine, kept):
            continue
        current = None
        problem = None
        try:
            current = _current(machine)
        except BaselineProblem as error:
            problem = str(error)
        for path in kept:
            header = None
            try:
                header = _header(path)
            except BaselineProblem as error:
                problem = str(error)
            found.append(Listed(machine.name, path.name, path.name == current, header, problem))
            problem = None
    return found


def _is_a_machines(folder: Path, kept: Sequence[Path]) -> bool:
    """Not any folder that lies there."""
    marks = [folder / CURRENT, *(path / HEADER for path in kept)]
    return any(paths.exists(mark, BaselineProblem) for mark in marks)


def resolve(path: Path, machine: Machine) -> Measured:
    """The baseline for this machine: of a folder of baselines the promoted one; a baseline, a run
    folder or a JSON file as it is. Raises BaselineProblem if there is none that it can be."""
    if not paths.exists(path, BaselineProblem):
        raise BaselineProblem(
            f"no baseline at {path}; `chela-bench baseline save` and `promote` make one"
        )
    if paths.exists(path / HEADER, BaselineProblem):
        found = _load(path)
    elif paths.is_file(path, BaselineProblem) or paths.exists(path / store.RUN, BaselineProblem):
        found = _read_records(path)
    else:
        found = _promoted(path, machine)
    _refuse_other_key(found, machine)
    return found


def _promoted(folder: Path, machine: Machine) -> Measured:
    key = machine_key(machine)
    name = _current(folder / key) if paths.is_dir(folder / key, BaselineProblem) else None
    if name is not None:
        return _load(folder / key / name)
    there = listed(folder)
    waiting = [one.name for one in there if one.key == key]
    if waiting:
        raise BaselineProblem(
            f"none of {key}'s baselines is promoted ({', '.join(waiting)}): "
            f"chela-bench baseline promote NAME --baselines {folder}"
        )
    others = ", ".join(dict.fromkeys(one.key for one in there if one.current)) or "none"
    raise BaselineProblem(
        f"no baseline for {key} in {folder}; there are for: {others}. Save one by name: "
        f"chela-bench baseline save RUN --name NAME --baselines {folder}, then promote it"
    )


def _refuse_other_key(found: Measured, machine: Machine) -> None:
    """Another GPU model, driver, torch or Triton is another baseline's business, not a failure."""
    then, now = found.machine, machine
    if (then.device == "static") != (now.device == "static"):
        raise BaselineProblem(
            f"the baseline {found.label} and what is held against it are not of one kind: compiled "
            "kernels are held against compiled kernels, times against times"
        )
    differing = [
        f"{what} {a or 'unknown'}, here {b or 'unknown'}"
        for what, a, b in (
            ("device", then.device, now.device),
            ("machine", then.name, now.name),
            ("driver", then.driver_major, now.driver_major),
            ("torch", then.torch, now.torch),
            ("Triton", then.triton, now.triton),
        )
        if a != b
    ]
    if differing:
        raise BaselineProblem(
            f"the baseline {found.label} is of {'; '.join(differing)}. A new baseline is wanted, "
            "by name: chela-bench baseline save RUN --name NAME, then promote it"
        )


def _load(path: Path) -> Measured:
    """A saved baseline, unchanged since it was saved."""
    header = _header(path)
    known = _FILES[header.kind]
    for file in header.files:
        if file not in known:
            raise BaselineProblem(
                f"{path / HEADER} names a file elsewhere, or of another kind: {file!r}; there are: "
                f"{', '.join(known)}"
            )
    for file in known:
        digest = header.files.get(file)
        if digest is None:
            if paths.exists(path / file, BaselineProblem):
                raise BaselineProblem(
                    f"{path / HEADER} has no SHA-256 of {file}, which lies beside it; save a new "
                    "baseline instead"
                )
            continue
        try:
            found = _sha256(path / file)
        except OSError as error:
            raise BaselineProblem(f"{path} lacks {file}: {error.strerror}; save it anew") from error
        if found != digest:
            raise BaselineProblem(
                f"{path / file} was changed after it was saved; save a new baseline instead"
            )
    measured = _read_records(path / _JSON_FILE.get(header.kind, ""))
    models = _models(path / MODELS) if MODELS in header.files else {}
    return replace(measured, label=str(path), models=models)


def _read_records(path: Path) -> Measured:
    """Something to hold against: what a baseline lacks may be lost without a word."""
    try:
        found = sources.read(path)
    except ChelaBenchError as error:
        raise BaselineProblem(str(error)) from error
    if not found.has_figures:
        raise BaselineProblem(
            f"the baseline {path} holds no points to hold against: they were lost, never measured, "
            "or all failed; give another"
        )
    if found.cut_off is not None:
        raise BaselineProblem(f"the baseline {path} was cut off: {found.cut_off}")
    return found


def _models(path: Path) -> dict[str, tuple[Case, int]]:
    models = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = ModelledPoint.model_validate_json(line)
        except ValidationError as error:
            problem = store.first_problem(error)
            raise BaselineProblem(f"{path}, line {number}: {problem}") from None
        models[row.case.key] = (row.case, row.model_bytes)
    return models


def _header(path: Path) -> Header:
    return read_kept(path / HEADER, Header)


def _current(machine: Path) -> str | None:
    path = machine / CURRENT
    if not paths.exists(path, BaselineProblem):
        return None
    current = read_kept(path, Current)
    header = machine / current.name / HEADER
    if not _NAME.fullmatch(current.name) or not paths.is_file(header, BaselineProblem):
        raise BaselineProblem(f"{path} names {current.name!r}, which is not there; promote another")
    return current.name


def read_kept(path: Path, model: type[_R]) -> _R:
    """Raises BaselineProblem, with the way out, if it is not there or damaged."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BaselineProblem(f"{path.parent} is no baseline: it has no {path.name}") from None
    except OSError as error:
        raise BaselineProblem(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError):
        raise BaselineProblem(f"{path} is not JSON, or only half of it; {model.way_out}") from None
    version = found.get("schema_version", SCHEMA_VERSION) if isinstance(found, dict) else None
    if version != SCHEMA_VERSION:
        raise BaselineProblem(
            f"{path} has schema_version {version}; this chela-bench reads {SCHEMA_VERSION}: "
            f"{model.way_out}"
        )
    try:
        return model.model_validate(found)
    except ValidationError as error:
        problem = store.first_problem(error)
        raise BaselineProblem(f"{path}: {problem}; {model.way_out}") from None


def facts(machine: Machine) -> dict[str, str]:
    """As records keep it."""
    found = {"device": machine.device, "name": machine.name, "uuid": machine.uuid}
    found |= machine.versions()
    return {name: _writable(value) for name, value in found.items() if value}


def _writable(text: str) -> str:
    """`?` for what is no character."""
    return text.encode("utf-8", "replace").decode()


def slug(text: str) -> str:
    """A file's name of a machine's; of one without such a letter a hash."""
    letters = re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-.")
    return letters or hashlib.sha256(_writable(text).encode()).hexdigest()[:8]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
