"""What a report page shows beside a run: its atlas, and how other runs compare with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ValidationError

from chela_bench.bench import comparing, paths, sources, store
from chela_bench.bench.noise import noise_of
from chela_bench.errors import RecordError
from chela_bench.records import AtlasRow, Refused
from chela_bench.reports import changes
from chela_bench.reports.atlas_maps import atlas_maps
from chela_bench.reports.figures import render
from chela_bench.reports.heat import draw_heat_map
from chela_bench.reports.html import Atlas
from chela_bench.verdicts import Comparison

ATLAS = "atlas.json"


class _Document(BaseModel):
    """`atlas --json`, which `atlas --out` writes too."""

    archs: list[str]
    points: list[AtlasRow]
    refused: list[Refused]


def atlas_of(folder: Path, file: Path | None) -> Atlas | None:
    """The file's, else the one that lies in the run folder; None where there is none."""
    path = file or folder / ATLAS
    if file is None and not paths.exists(path):
        return None
    try:
        found = _Document.model_validate_json(path.read_bytes())
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        raise RecordError(
            f"{path} is no atlas, as `chela-bench atlas --json` writes it: "
            f"{store.first_problem(error)}"
        ) from None
    maps = atlas_maps(found.points, found.archs)
    svgs = {name: render(draw_heat_map(heat), "svg") for name, heat in maps.items()}
    return Atlas(found.points, found.refused, found.archs, svgs)


def compared(
    folders: Sequence[Path], baselines: Path, *, across_machines: bool
) -> list[tuple[Comparison, bytes | None]]:
    """Each further run with the first one, and the figure of their ratios."""
    first, *others = (
        replace(sources.read(folder), label=paths.real_name(folder)) for folder in folders
    )
    found: list[tuple[Comparison, bytes | None]] = []
    for other in others:
        comparison = comparing.compare(
            first, other, noise_of(baselines, other.machine), across_machines=across_machines
        )
        drawn = changes.figure(comparison)
        found.append((comparison, None if drawn is None else render(drawn, "svg")))
    return found
