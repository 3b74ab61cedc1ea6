"""What the page says beside points: findings, scaling, samples, block sizes, atlas, comparisons."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from chela_bench.bench import store
from chela_bench.cli import cli, derived
from chela_bench.errors import BaselineProblem, RecordError, UsageError
from chela_bench.records import AtlasRow, Point, Run, Static
from chela_bench.reports.findings import findings
from chela_bench.reports.fit import Break, fitted_break
from chela_bench.reports.groups import drawn_beside, groups
from chela_bench.reports.html import _sort_key, amount, page
from chela_bench.reports.quantities import (
    error_by_length_sheet,
    error_sheet,
    hbm_sheet,
    memory_sheet,
)
from chela_bench.reports.samples import written_samples
from chela_bench.reports.scaling import scaling
from tests.factories import (
    LENGTHS,
    cpu_sweep,
    h100_sweep,
    layer_sweep,
    make_cpu_run,
    make_failure,
    make_point,
    make_run,
    profiled_sweep,
)
from tests.running import ROOT, environment
from tests.test_html import SVG, Element, rows_of, tree


def table(root: Element, name: str) -> list[list[str]]:
    """Rows of the table whose caption begins so."""
    (found,) = [t for t in root.all("table") if t.inside[0].words.startswith(name)]
    return rows_of(found)


# Findings


def test_three_sentences_say_what_a_reader_needs() -> None:
    said = findings(groups([*h100_sweep(), *h100_sweep("fwdbwd")]))
    assert said == {
        "Fastest": "The fastest at the longest length that ran: triton_chunked for "
        "linear_attention.",
        "Distance from the floor": "Time at the longest length, as a multiple of the floor: "
        "linear_attention 1.44.",
        "Growth with T": "Over the longer half of the lengths their times grow as T to the power "
        "of: linear_attention 0.96 ±0.03. linear_attention/triton_chunked against "
        "softmax_attention/sdpa_flash: fwd faster from T = 1k on, 100 times faster at 64k; fwdbwd "
        "faster from T = 1k on, 100 times faster at 64k.",
    }


def test_a_crossover_against_softmax_is_found() -> None:
    said = findings(groups([*layer_sweep(), *layer_sweep("fwdbwd")]))
    assert "chela_merged for chela_layer (fwd); chela for chela_layer (fwdbwd)" in said["Fastest"]
    growth = said["Growth with T"]
    assert "chela_merged against softmax_layer/sdpa_cudnn: fwd faster beyond T = 10.0k." in growth
    assert "chela against softmax_layer/sdpa_cudnn: fwdbwd faster beyond T = 12.2k." in growth


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ([], ("Nothing ran", "No floor is known", "Too few lengths")),
        ([make_failure("oom", "no memory")], ("Nothing ran", "No floor is known", "Too few")),
        (cpu_sweep(), ("chunked for linear_attention", "No floor is known", "1.00 ±0.00")),
    ],
)
def test_what_is_not_known_is_said(points: list[Point], words: tuple[str, ...]) -> None:
    said = findings(groups(points))
    assert all(part in sentence for part, sentence in zip(words, said.values(), strict=True))
    assert said["Growth with T"].endswith("it was not measured beside the same sizes.")


# Scaling


def test_a_power_of_t_breaks_nowhere_and_a_floor_under_it_where_it_shows() -> None:
    assert fitted_break(LENGTHS, [3e-9 * T for T in LENGTHS]) is None
    flat = fitted_break(LENGTHS, [max(T, 8192) * 1e-9 for T in LENGTHS])
    assert flat == Break(4096, pytest.approx(2.0))
    assert fitted_break([1, 2], [1.0, 9.0]) is None
    jump = fitted_break(LENGTHS, [T * (1.5 if T == 32768 else 1) for T in LENGTHS])
    assert jump is not None
    assert jump.tokens == 65536 and jump.ratio < 0.9  # no single power over the fitted lengths


def test_growth_names_exponent_break_and_end() -> None:
    (group, _) = groups(h100_sweep())
    growth, crossed = scaling(group, drawn_beside(group, groups(h100_sweep())))
    rows = {row[0]: dict(zip(growth.header, row, strict=True)) for row in growth.rows}
    assert rows["naive_cumsum"]["exponent p"] == "1.00"
    assert rows["naive_cumsum"]["ends"] == "32k: oom"
    assert rows["recurrent"]["ends"] == "16k: skipped"
    chunked = rows["triton_chunked"]
    assert chunked["fitted"] == "8k..64k" and chunked["breaks at"] == "2k"
    assert float(chunked["lowest"]) < float(chunked["exponent p"]) < float(chunked["highest"])
    pairs = [row[1:3] for row in crossed.rows]
    assert ("chunked", "softmax_attention/sdpa_flash") in pairs  # with the function beside
    assert ("chunked", "quadratic") in pairs  # within the group
    assert len(set(pairs)) == len(pairs)


def test_one_length_has_no_scaling() -> None:
    (group,) = groups([make_point(1024)])
    assert scaling(group, None) == []


# Tables beside figures


def test_tables_by_length_hold_what_the_figures_draw() -> None:
    (group, _) = groups(profiled_sweep())
    memory = {row[0]: row[1:] for row in memory_sheet(group).rows}
    assert memory["triton_chunked"][0] == "4.00" and memory["triton_chunked"][-1] == "256"
    hbm = {row[0]: row[1:] for row in hbm_sheet(group).rows}
    assert hbm["triton_chunked"][0] == "16.5" and hbm["chunked"][0] == "49.6 m"
    assert hbm["naive_cumsum"][-2:] == ("", "")


def test_errors_stand_against_their_budget() -> None:
    errors = {"o": 1e-3, "dq": 4e-3}
    points = [
        make_point(errors=errors, error_rel=4e-3, error_budget=8e-3),
        make_failure("wrong", "o is 0.5 off", 2048, errors={"o": 0.5}, error_rel=0.5),
    ]
    sheet = error_sheet(*groups(points))
    assert sheet.header == (
        "T", "implementation", "largest in", "of budget", "error", "budget", "o", "dq",
    )  # fmt: skip
    assert sheet.rows == (
        ("1k", "chunked", "dq", "50.0 %", "4.0e-03", "8.0e-03", "1.0e-03", "4.0e-03"),
    )
    [by_length] = error_by_length_sheet(*groups(points)).rows
    assert by_length == ("chunked", "4.0e-03")
    one = make_point(errors={"o": 1e-3}, error_rel=1e-3, error_budget=8e-3)
    assert error_sheet(*groups([one])).header[-1] == "budget"  # error says what o would
    many = {f"d{i}": i * 1e-4 for i in range(20)}
    sheet = error_sheet(*groups([make_point(errors=many, error_rel=1.9e-3, error_budget=1e-2)]))
    assert sheet.rows == (("1k", "chunked", "d19", "19.0 %", "1.9e-03", "1.0e-02"),)


@pytest.mark.parametrize(
    ("text", "key"),
    [("0.512", ""), ("64k", ""), ("1.05M", ""), ("12 %", ""), ("16.0 m", ""), ("1.7e-03", ""),
     ("words", ""), ("", ""), ("64k: oom", "65536"), ("0.0139 (wall)", "0.0139"),
     ("229 376", "229376"), ("1.0e-03 / 8.0e-03", "0.001"), ("4k..8k", "4096")],
)  # fmt: skip
def test_a_cell_carries_the_number_that_its_text_does_not_show(text: str, key: str) -> None:
    assert _sort_key(text) == (f' data-value="{key}"' if key else "")
    assert not key or amount(text) == float(key)


# Samples


@pytest.mark.parametrize("count", [1, 3, 512, 513, 5000])
def test_samples_are_written_short_and_read_back(count: int) -> None:
    samples = [10**6 + (i * 7919) % 3001 for i in range(count)]
    least, *excess = (int(word, 36) for word in written_samples(samples).split())
    read = [least + each for each in excess]
    assert len(read) == min(count, 512) and min(read) == least
    if count <= 512:
        assert read == samples
    else:
        assert read[0] == samples[0] and set(read) <= set(samples)


def test_every_point_with_samples_carries_them() -> None:
    points = h100_sweep()
    samples = {point.key: [5, 7] for point in points if point.seconds}
    root = tree(page(make_run(), points, {}, samples))
    cells = [c for c in root.all("td") if "data-samples" in c.attributes]
    assert len(cells) == len([p for p in points if p.time_ns]) > 40
    assert {c.attributes["data-samples"] for c in cells} == {"5 0 2"}
    assert "distributions cannot be shown" not in root.words
    assert "distributions cannot be shown" in page(make_run(), points, {})


# Clocks


def test_provenance_has_the_clocks_and_what_held_them() -> None:
    low = {"sm_clock_mhz": 1900, "sm_clock_min_mhz": 1665, "mem_clock_mhz": 2619}
    points = [
        make_point(telemetry=low, throttle=["power_cap"]),
        make_point(2048, telemetry={"sm_clock_mhz": 1980}, throttle=[]),
    ]
    rows = dict(table(tree(page(make_run(), points, {})), "What was measured"))  # type: ignore[arg-type]
    assert rows["Clocks"] == "SM 1665 to 1980 MHz, memory 2619 MHz while timing"
    assert rows["Throttling"] == "power_cap at 1 of 2 points"
    cpu = dict(table(tree(page(make_cpu_run(), cpu_sweep(), {})), "What was measured"))  # type: ignore[arg-type]
    assert not {"Clocks", "Throttling"} & set(cpu)


# The command


def run_folder(path: Path, points: list[Point], *, slower: float = 1.0, **changes: object) -> Path:
    with store.RunFolder(path) as folder:
        folder.write_run(make_run(run_id=path.name, **changes))
        for point in points:
            median = 0.0 if point.time_ns is None else point.time_ns.median * slower
            jitter = [median * (1 + (i * 7919 % 11 - 5) / 5000) for i in range(44)]
            folder.append(point, jitter if median else [])
    return path


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derived, "figures", lambda run, points: {})
    monkeypatch.setattr(derived, "FORMATS", ("svg",))


def invoke(*words: object) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


POINTS = [make_point(T, time_ns=1e3 * T, wall_ns=10**6, host_ns=10**4) for T in LENGTHS]


@pytest.mark.usefixtures("no_figures")
def test_two_runs_are_compared_on_one_page(tmp_path: Path) -> None:
    slower = [make_point(T, time_ns=1.2e3 * T, wall_ns=10**6, host_ns=10**4) for T in LENGTHS[1:]]
    before = run_folder(tmp_path / "before", POINTS)
    after = run_folder(tmp_path / "after", slower)
    out = tmp_path / "out"
    done = invoke("report", before, after, "--compare", "-o", out)
    assert done.exit_code == 0, done.output
    assert f"report of all: {out / 'index.html'}" in done.output
    assert (out / "before" / "index.html").exists() and (out / "after" / "index.html").exists()
    root = tree((out / "index.html").read_text(encoding="utf-8"))
    ids = [e.attributes["id"] for e in _elements(root) if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    assert {link.attributes["href"] for link in root.all("a")} <= {f"#{id_}" for id_ in ids}
    rows = table(root, "Ratios of before compared with after")
    assert len(rows) == 7
    assert [row[1] for row in rows] == ["slower"] * 6 + ["only before"]
    assert all(float(row[5]) == pytest.approx(1.2, rel=1e-3) for row in rows[:6])
    assert root.words.count("Provenance") == 4  # of each run, and the links there
    (image,) = root.all("img")
    assert "Ratios" in str(image.attributes["alt"])
    levels = [int(e.tag[1]) for e in root.all("h1", "h2", "h3", "h4")]
    assert levels.count(1) == 1


def _elements(root: Element) -> list[Element]:
    return [root, *(found for child in root.inside for found in _elements(child))]


@pytest.mark.usefixtures("no_figures")
def test_several_runs_without_a_place_have_their_page_in_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = (run_folder(tmp_path / name, POINTS[:1]) for name in ("one", "two"))
    done = invoke("report", one, two, "--json")
    assert done.exit_code == 0, done.output
    assert len(done.stdout.splitlines()) > 2 and "report of all" not in done.stdout
    root = tree((tmp_path / "report" / "index.html").read_text(encoding="utf-8"))
    assert root.all("h1")[0].words == "2 runs: one, two"
    assert "Ratios of" not in root.words
    assert (one / "report" / "index.html").exists() and (two / "results.csv").exists()


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("file", [store.RUN, store.POINTS, store.SAMPLES, "atlas.json"])
def test_nothing_is_reported_where_one_run_is_damaged(tmp_path: Path, file: str) -> None:
    one, two = (run_folder(tmp_path / name, POINTS[:1]) for name in ("one", "two"))
    (two / file).write_text("no record\n")
    for place in ([], ["-o", tmp_path / "out"]):
        done = invoke("report", one, two, *place)
        assert isinstance(done.exception, RecordError) and done.stdout == ""
        assert not (tmp_path / "out").exists() and not (one / "report").exists()
        assert not (one / "results.csv").exists()


@pytest.mark.usefixtures("no_figures")
def test_other_machines_are_compared_only_when_asked(tmp_path: Path) -> None:
    points = [make_point(T, time_ns=1e3 * T, floor_ns=500 * T) for T in LENGTHS]
    one = run_folder(tmp_path / "one", points)
    card = make_run().environment.model_copy(update={"uuid": "GPU-1"})
    two = run_folder(tmp_path / "two", points, environment=card)
    out = tmp_path / "out"
    done = invoke("report", one, two, "--compare", "-o", out)
    assert isinstance(done.exception, BaselineProblem)
    assert "--across-machines" in str(done.exception) and not out.exists()
    done = invoke("report", one, two, "--compare", "--across-machines", "-o", out)
    assert done.exit_code == 0, done.output
    text = (out / "index.html").read_text(encoding="utf-8")
    assert "multiples of each machine's floor" in tree(text).words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compare"], "--compare takes two runs or more"),
        (["--across-machines"], "--compare takes two runs or more"),
        (["{two}", "--across-machines"], "--across-machines goes with --compare"),
        (["{two}", "--atlas", "atlas.json"], "--atlas goes with one run"),
    ],
)
def test_options_that_go_with_others(tmp_path: Path, words: list[str], message: str) -> None:
    one, two = (run_folder(tmp_path / name, POINTS[:1]) for name in ("one", "two"))
    done = invoke("report", one, *(word.format(two=two) for word in words))
    assert isinstance(done.exception, UsageError)
    assert str(done.exception).startswith(message)
    assert not (one / "report").exists()


# Block sizes and atlas


def _blocks() -> list[Point]:
    return [
        make_point(
            T, time_ns=100.0 * T * (1 + abs(t - 64) / 100 + abs(v - 128) / 500),
            config={"BLOCK_T": t, "BLOCK_V": v}, static=Static(smem_bytes=t * v * 4, regs=128),
        )
        for T in (1024, 4096) for t in (32, 64) for v in (64, 128)
    ]  # fmt: skip


def test_a_sweep_over_two_settings_has_its_heat_map_and_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(derived, "FORMATS", ("svg",))
    monkeypatch.setattr(derived, "figures", lambda run, points: {})
    folder = run_folder(tmp_path / "run", _blocks())
    done = invoke("report", folder, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    slug = "linear_attention-fwd-bf16-B1-H16-K128-V128"
    assert (tmp_path / "out" / f"{slug}-blocks-1.svg").exists()
    root = tree((tmp_path / "out" / "index.html").read_text(encoding="utf-8"))
    (image,) = root.all("img")
    assert str(image.attributes["alt"]).startswith("Time over two settings of chunked")
    rows = table(root, "Block sizes")
    assert len(rows) == 8
    assert rows[0][:7] == ["1k", "chunked", "64", "128", "0.102", "1.000", "32"]


def _atlas(**changes: object) -> dict[str, object]:
    rows = [
        AtlasRow(
            op="linear_attention", impl="triton_chunked", kernel="fwd", language="triton",
            dtype="bf16", config={"BLOCK_T": t, "BLOCK_V": v}, constants={},
            asked=[{"BLOCK_T": t, "BLOCK_V": v}], directions=["fwd"], lens=[1024], arch=arch,
            triton="3.6.0", outcome="ok" if fits else "out_of_resources", fits=fits,
            reason=None if fits else "wants 196 KB of 99 KB", smem_bytes=t * v * 12, regs=128,
            ctas_per_sm=2 if fits else None, limiter="shared memory",
        )
        for arch in ("sm_86", "sm_90") for t in (64, 128) for v in (64, 128)
        for fits in [arch == "sm_90" or t * v < 128 * 128]
    ]  # fmt: skip
    points = [row.model_dump(mode="json") for row in rows]
    return {"triton": "3.6.0", "archs": ["sm_86", "sm_90"], "points": points, "refused": [],
            **changes}  # fmt: skip


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("given", [True, False])
def test_an_atlas_has_its_maps_and_tables(tmp_path: Path, given: bool) -> None:
    folder = run_folder(tmp_path / "run", POINTS[:1])
    path = tmp_path / "other.json" if given else folder / "atlas.json"
    path.write_text(json.dumps(_atlas()))
    option = ["--atlas", path] if given else []
    done = invoke("report", folder, "-o", tmp_path / "out", *option)
    assert done.exit_code == 0, done.output
    root = tree((tmp_path / "out" / "index.html").read_text(encoding="utf-8"))
    assert len(root.all("img")) == 3
    rows = table(root, "linear_attention: fwd of the atlas")
    assert len(rows) == 4
    assert rows[-1] == ["BLOCK_T=128, BLOCK_V=128", "192K 128 too much", "192K 128 x2"]
    assert "8 kernels compiled: 7 fit, 1 out_of_resources, by Triton 3.6.0" in root.words
    assert "wants 196 KB of 99 KB" in root.words


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read"),
        ("nonsense", "is no atlas"),
        (
            json.dumps(_atlas(archs=7)),
            "is no atlas, as `chela-bench atlas --json` writes it: archs",
        ),
    ],
)
def test_what_is_no_atlas_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    folder = run_folder(tmp_path / "run", POINTS[:1])
    path = tmp_path / "atlas.json"
    if text is not None:
        path.write_text(text)
    done = invoke("report", folder, "-o", tmp_path / "out", "--atlas", path)
    assert isinstance(done.exception, RecordError)
    assert message in str(done.exception) and str(path) in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_figures_of_a_run_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a heat map that no section asks for is not shown."""
    run: Run = make_run()
    assert "<img" not in page(run, POINTS, {"another-blocks-1": SVG})


def test_an_ordinary_page_draws_nothing_itself() -> None:
    code = (
        "import sys; from tests.factories import h100_sweep, make_run;"
        "from chela_bench.reports.html import page; page(make_run(), h100_sweep(), {});"
        "sys.exit(bool({'pandas', 'matplotlib', 'numpy'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), check=True)
