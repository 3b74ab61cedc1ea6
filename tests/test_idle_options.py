"""Options that would do nothing where they stand are refused, before anything is measured."""

from __future__ import annotations

import pytest

from tests.records import timed, write_run
from tests.running import in_this_process, tiny_config

SWEEP = ("sweep", "--config", "bench.toml", "--device", "cpu", "--impl", "chunked", "--dry-run")
LIVE = "goes with --live: records are not measured again"
OUT = "--resume goes on in the run's own folder: no --out"
OWN = "--resume takes the run's own settings: leave the others out, here"
FROM = "--from reads a capture as it is: leave OP and its options out, here"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("compare", "run", "run", "--budget", "3s"), f"--budget {LIVE}"),
        (("compare", "run", "run", "--budget", "30s"), f"--budget {LIVE}"),  # the default, said
        (("compare", "run", "run", "--device", "cpu"), f"--device {LIVE}"),
        (("compare", "run", "run", "--config", "bench.toml"), f"--config {LIVE}"),
        (("gate", "run", "--baseline", "run", "--budget", "3s"), f"--budget {LIVE}"),
        (("gate", "--live", "main", "--rounds", "3"), "--rounds goes with --baseline: --live goes"),
        (("profile", "--from", "c.csv", "--lens", "4k"), f"{FROM} --lens"),
        (("profile", "long_conv", "--from", "c.csv", "--set", "H=1"), f"{FROM} OP, --set"),
        (("profile", "--from", "c.csv", "--ncu-report", "x"), f"{FROM} --ncu-report"),
        ((*SWEEP, "--mix-gpus"), "--mix-gpus goes with --gpus 0,1 or --gpus all"),
        ((*SWEEP, "--ncu-report", "x"), "--ncu-report goes with --hbm ncu"),
        ((*SWEEP, "--hbm", "auto", "--ncu-report", "x"), "--ncu-report goes with --hbm ncu"),
        ((*SWEEP, "--set", "H=1,H=2"), "--set gives H twice: 1 and 2"),
        ((*SWEEP, "--set", "H=1", "--set", "K=8,H=1"), "--set gives H twice: 1 and 1"),
        (("sweep", "--resume", "run", "--out", "elsewhere"), OUT),
        (("sweep", "--resume", "run", "--out", "runs", "--dry-run"), OUT),  # the default, said
        (("tune", "--resume", "run", "--out", "elsewhere"), OUT),
        (("tune", "--resume", "run", "--seed", "0"), f"{OWN} --seed"),
        (("tune", "--resume", "run", "--device", "auto"), f"{OWN} --device"),
        (("tune", "long_conv", "--resume", "run", "--set", "H=1"), f"{OWN} OP, --set"),
        (("tune", "long_conv", "--seed", "9" * 29), f"Invalid value for '--seed': {'9' * 29}"),
        (("atlas", "linear_attention", "--set", "H=1,H=2"), "--set gives H twice: 1 and 2"),
        (("atlas", "linear_attention", "--limit", "nan"), "'nan' is no number"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_would_do_nothing_is_refused(tmp_path, monkeypatch, words, said):
    monkeypatch.setattr("chela_bench.bench.atlas.compile_all", None)
    write_run(tmp_path / "run", [timed()])
    tiny_config(tmp_path)
    done = in_this_process(*words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


def test_the_same_without_them_is_taken(tmp_path):
    write_run(tmp_path / "run", [timed()])
    tiny_config(tmp_path)
    for words in (("compare", "run", "run"), ("gate", "run", "--baseline", "run"),
                  (*SWEEP, "--set", "H=1,K=8", "--set", "V=8")):  # fmt: skip
        done = in_this_process(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
