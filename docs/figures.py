"""Makes every figure and table of docs/ again, from the records in docs/results. `make figures`.

What is there is made again: to add one of a run's figures, put an empty file of its name into the
run's report/. Figures depend on the records and on the versions of matplotlib and what it draws
with; constraints.txt pins them.
"""

from __future__ import annotations

import importlib.util
import io
import json
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

from chela_bench.bench.store import load_run, load_samples
from chela_bench.cli.derived import PAGE, report_files
from chela_bench.cli.pages import atlas_of
from chela_bench.reports.figures import Format, figures, render
from chela_bench.reports.heat import draw_heat_map
from chela_bench.reports.markdown import summary
from chela_bench.reports.tune import tune_maps

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
RESULTS = DOCS / "results"
DRAWN = (".png", ".svg")
_LAYER = "chela_layer-{}-bf16-B1-D1024-K128-V2048-time"
ELSEWHERE = {  # in docs/: run folder and figure
    "results/chela-layer-forward.png": ("h100-layer-crossover", _LAYER.format("fwd")),
    "results/chela-layer-backward.png": ("h100-layer-crossover", _LAYER.format("fwdbwd")),
    "how-to/roofline.png": ("h100", "linear_attention-fwd-bf16-B1-H16-K128-V128-roofline"),
}
_FORMATS: dict[str, Format] = {".png": "png", ".svg": "svg"}
_DRAW_WITH = ("matplotlib", "numpy", "pillow")  # layout and pixels depend on them


def targets() -> dict[Path, Callable[[], bytes]]:
    """Every file that is made from records, and what makes it."""
    found: dict[Path, Callable[[], bytes]] = {}
    for path in sorted(RESULTS.rglob("report/*")):
        folder = path.parent.parent
        if path.name == PAGE:
            found[path] = lambda folder=folder: _page(folder)
        elif path.name == "summary.md":
            found[path] = lambda folder=folder: _summary(folder)
        elif path.suffix in DRAWN:
            found[path] = lambda folder=folder, path=path: _figure(folder, path.stem, path.suffix)
    for path in sorted(RESULTS.glob("*/*-tune.svg")):
        found[path] = lambda path=path: _heat_map(path)
    for name, (run, figure) in ELSEWHERE.items():
        found[DOCS / name] = lambda run=run, figure=figure, name=name: _figure(
            RESULTS / run, figure, Path(name).suffix
        )
    trials = RESULTS / "gate-simulation"
    found[trials / "table.md"] = lambda: _simulation().table(_trials()).encode()
    for suffix in DRAWN:
        found[trials / f"gate-simulation{suffix}"] = lambda suffix=suffix: render(
            _simulation().figure(_trials()), _FORMATS[suffix]
        )
    return found


def same(before: bytes, after: bytes) -> bool:
    """Pictures by their pixels: how well a PNG is compressed depends on the processor."""
    if before == after:
        return True
    if not (before.startswith(b"\x89PNG") and after.startswith(b"\x89PNG")):
        return False
    one, other = (
        np.asarray(Image.open(io.BytesIO(data)).convert("RGBA")) for data in (before, after)
    )
    return one.shape == other.shape and bool((one == other).all())


def other_versions() -> list[str]:
    """What is installed here in another version than constraints.txt says."""
    pins = dict(re.findall(r"(?m)^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text()))
    return [
        f"{name} {version(name)} here, {pins[name]} pinned"
        for name in _DRAW_WITH
        if version(name) != pins[name]
    ]


def _summary(folder: Path) -> bytes:
    return summary(*load_run(folder)).encode()


def _page(folder: Path) -> bytes:
    run, points = load_run(folder)
    atlas = atlas_of(folder, RESULTS / "h100-atlas" / "atlas.json")
    _, files = report_files(run, points, load_samples(folder), atlas, formats=())
    return files[PAGE]


def _heat_map(path: Path) -> bytes:
    return render(draw_heat_map(tune_maps(*load_run(path.parent))[path.stem]), "svg")


def _figure(folder: Path, name: str, suffix: str) -> bytes:
    [figure] = figures(*load_run(folder), only={name}).values()
    return render(figure, _FORMATS[suffix])


def _trials() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = json.loads(
        (RESULTS / "gate-simulation" / "trials.json").read_text()
    )
    return rows


def _simulation() -> ModuleType:
    path = ROOT / "benchmarks" / "gate_simulation.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    for difference in other_versions():
        print(f"{difference}: letters and layout may move")
    changed = 0
    made = targets()
    for path, make in made.items():
        data = make()
        if not same(path.read_bytes() if path.exists() else b"", data):
            path.write_bytes(data)
            changed += 1
            print(f"wrote {path.relative_to(ROOT)}")
    print(f"{len(made)} files of docs made, {changed} changed")


if __name__ == "__main__":
    main()
