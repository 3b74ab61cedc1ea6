"""A separate distribution adds an implementation and an op; a broken one is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from chela_bench.bench import registry
from tests.running import ROOT, chela_bench, in_this_process, swept, tiny_config
from tests.test_doctor import STUB, stub_torch


def _site(folder):
    """PYTHONPATH with a folder of installed distributions behind the project's own."""
    return os.pathsep.join([str(ROOT), str(folder)])


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The example plug-in, built and installed by pip."""
    site = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
         "--no-build-isolation", "--target", site, ROOT / "examples" / "plugin"],
        check=True,
    )  # fmt: skip
    return site


def test_list_shows_what_a_plug_in_adds(installed):
    done = chela_bench("list", "--json", "--device", "cpu", PYTHONPATH=_site(installed))
    ops = {row["op"]: row for row in json.loads(done.stdout)["ops"]}
    names = [impl["name"] for impl in ops["linear_attention"]["implementations"]]
    assert names[-1] == "example_loop"
    assert ops["running_mean"]["shapes"]["small"] == {"B": 1, "D": 64}
    assert "running_mean" not in in_this_process("list").stdout


def test_a_plug_in_is_measured_like_everything_else(
    forked_workers, installed, found_here, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(installed)
    monkeypatch.setenv("PYTHONPATH", str(installed))
    done, document = swept(
        "--op", "linear_attention,running_mean", "--impl", "example_loop,cumsum", "--shape",
        "tiny,small", "--lens", "300", "--direction", "fwd,fwdbwd", "--axis", "CHUNK=32,64",
        config=tiny_config(tmp_path),
    )  # fmt: skip
    outcomes = {(p["op"], p["direction"]): p["outcome"] for p in document["points"]}
    assert len(document["points"]) == 6
    assert set(outcomes.values()) == {"ok"}, document["points"]
    assert set(outcomes) == {
        (op, way) for op in ("linear_attention", "running_mean") for way in ("fwd", "fwdbwd")
    }
    assert document["run"]["versions"]["chela-bench-example"] == "0.1.0"
    assert done.returncode == 0


def _distribution(site, name, module, entry):
    """An installed distribution with one module and one entry point."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[chela_bench.impls]\n{entry}\n")
    (site / f"{name}.py").write_text(f"from chela_bench.bench.ops import OPS, Impl, Op\n{module}\n")


@pytest.fixture
def found_here(tmp_path, monkeypatch):
    """A folder whose distributions this process finds installed."""
    monkeypatch.syspath_prepend(tmp_path)
    registry.all_ops.cache_clear()
    yield tmp_path
    registry.all_ops.cache_clear()
    sys.modules.pop("broken", None)


@pytest.mark.parametrize(
    ("module", "entry", "problem"),
    [
        ("import no_such_thing", "linear_attention = broken:X", "does not load: ModuleNotFound"),
        ("", "linear_attention = broken:X", "does not load: AttributeError"),
        ("raise SystemExit(3)", "linear_attention = broken:X", "does not load: SystemExit: 3"),
        ("X = 3", "linear_attention = broken:X", "holds int; wanted an Op, an Impl or a sequence"),
        ("X = []", "linear_attention = broken:X", "holds list; wanted an Op, an Impl"),
        ("X = Impl('a', 'a:a', '')", "linear = broken:X", "is named after no op; there are: lin"),
        ("X = Impl('chunked', 'a:a', '')", "linear_attention = broken:X",
         "brings linear_attention/chunked, which there is already"),
        ("X = OPS[0]", "anything = broken:X", "an op 'linear_attention', which there is already"),
        ("from dataclasses import replace; X = replace(OPS[0], name='x', dims=('B', 'D'))",
         "x = broken:X", "whose dims lack B or T"),
        ("from dataclasses import replace; X = replace(OPS[0], name='x', shapes={'s': {'B': 1}})",
         "x = broken:X", "brings a shape 's' that is no size for each of"),
    ],
)  # fmt: skip
def test_a_broken_plug_in_is_one_sentence_with_the_way_out(found_here, module, entry, problem):
    _distribution(found_here, "broken", module, entry)
    done = in_this_process("list")
    assert done.returncode == 2
    assert problem in done.stderr
    assert "pip uninstall broken" in done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_names_a_broken_plug_in_and_the_remedy(found_here):
    _distribution(found_here, "broken", "import no_such_thing", "linear_attention = broken:X")
    stub = stub_torch(found_here, STUB)
    done = in_this_process(
        "doctor", "--json", "--out", found_here / "runs", PYTHONPATH=_site(stub)
    )  # fmt: skip
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert done.returncode == 6
    assert "plug-in broken" in checks["plug-ins"]["found"]
    assert checks["plug-ins"]["remedy"] == "mend it, or: pip uninstall broken"
    assert checks["bench.toml"]["state"] == "ok"
