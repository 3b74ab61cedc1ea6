"""`python -m build` gives a wheel that works alone, in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

from tests.running import ROOT

SMOKE = """
import pathlib, sys, torch
import chela_bench
from chela_bench.kernels.chela import ChelaLayer
from chela_bench.kernels.linear_attention import linear_attention
from chela_bench.kernels.short_long_conv import short_long_conv
from chela_bench.reference.linear_attention import chunked, recurrent
assert pathlib.Path(chela_bench.__file__).is_relative_to(sys.prefix), chela_bench.__file__
q, k, v = (torch.randn(1, 70, 2, 16) for _ in range(3))
torch.testing.assert_close(chunked(q, k, v)[0], recurrent(q, k, v)[0], rtol=1e-4, atol=1e-4)
assert ChelaLayer(16, d_key=8, max_length=32)(torch.randn(1, 32, 16)).shape == (1, 32, 16)
"""


def run(*words, cwd):
    """Without the checkout on the path, and without what the caller's environment adds."""
    left_out = {"PYTHONPATH", "VIRTUAL_ENV", "TRITON_INTERPRET"}
    env = {name: value for name, value in os.environ.items() if name not in left_out}
    return subprocess.run(
        [str(word) for word in words],
        cwd=cwd, env={**env, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the source distribution, as a release is."""
    folder = tmp_path_factory.mktemp("dist")
    done = run(
        sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(folder.glob("*.tar.gz"))) == 1
    [path] = folder.glob("*.whl")
    return path


def test_it_holds_the_package_and_nothing_beside_it(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"chela_bench"}
    there = {
        f"chela_bench/{path.relative_to(ROOT / 'chela_bench')}"
        for path in (ROOT / "chela_bench").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert there | {"chela_bench/bench.toml"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_it_works_alone(wheel, tmp_path):
    """Its dependencies are the caller's, by a path; the package itself is what was installed."""
    home, empty = tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    venv.create(home, with_pip=False)
    [packages] = home.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = home / "bin" / "python"
    done = run(
        sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps",
        "--no-index", "--ignore-installed", wheel, cwd=empty,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

    script = home / "bin" / "chela-bench"
    done = run(script, "--help", cwd=empty)
    assert done.returncode == 0 and "sweep" in done.stdout, done.stderr
    done = run(script, "list", "--device", "cpu", cwd=empty)
    assert done.returncode == 0 and "linear_attention" in done.stdout, done.stderr
    done = run(script, "sweep", "--device", "cpu", "--op", "long_conv", "--dry-run", cwd=empty)
    assert done.returncode == 0 and "long_conv" in done.stdout, done.stderr
    done = run(python, "-c", SMOKE, cwd=empty)
    assert done.returncode == 0, done.stderr
    assert list(empty.iterdir()) == []
