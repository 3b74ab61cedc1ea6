"""Fatter kernels, really compiled: the static gate finds them without a GPU, by name."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from chela_bench import cli
from tests.running import ROOT, command, environment, in_this_process

pytestmark = pytest.mark.skipif("atlas" not in cli.COMMANDS, reason="there is no atlas to compile")

WALK = "chela_bench/kernels/linear_attention_walk.py"
LOOP, DEEPER = (f"in {loop}:" for loop in ("range(0, chunks)", "tl.range(0, chunks, num_stages=5)"))


def compiled(root, path):
    """What the package in `root` compiles to for sm_86, as a file of `atlas --json`."""
    words = command("atlas", "linear_attention", "--arch", "sm_86", "--axis", "BLOCK_T=64",
                    "--dtype", "bf16", "--jobs", "2", "--json")  # fmt: skip
    words.insert(1, "-P")
    done = subprocess.run(
        words, cwd=path.parent, env=environment(PYTHONPATH=str(root)), capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    path.write_text(done.stdout)
    return path


def test_more_stages_than_the_card_has_memory_for(tmp_path):
    """Five tiles in flight instead of two: more SRAM, more spills, and too much for an sm_86."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "chela_bench", copy / "chela_bench")
    shutil.copyfile(ROOT / "bench.toml", copy / "bench.toml")
    text = (copy / WALK).read_text()
    assert LOOP in text
    (copy / WALK).write_text(text.replace(LOOP, DEEPER))
    then, now = compiled(ROOT, tmp_path / "then.json"), compiled(copy, tmp_path / "now.json")
    done = in_this_process("gate", now, "--baseline", then, "--json", cwd=tmp_path)
    failed = [c for c in json.loads(done.stdout)["points"] if c["outcome"] == "failed"]
    assert done.returncode == 1
    assert {"smem_bytes", "fits", "spill_store_bytes"} <= {check["figure"] for check in failed}
    for check in failed:
        assert "BLOCK_T=64" in check["name"] and check["name"].endswith("/sm_86")
    assert any("linear_attention_walk" in c["name"] for c in failed if c["figure"] == "fits")
    assert in_this_process("gate", then, "--baseline", then, cwd=tmp_path).returncode == 0
