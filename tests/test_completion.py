"""What a shell completes, asked as a shell asks: through the environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from chela_bench.cli import complete
from chela_bench.profiles import nvml
from tests.running import environment, in_this_process, tiny_config


def _completed(line, cwd=None):
    """(type, value) of each proposal for the last word of the line."""
    words = line.split(" ")
    done = in_this_process(
        cwd=cwd,
        _CHELA_BENCH_COMPLETE="bash_complete",
        COMP_WORDS=line,
        COMP_CWORD=str(len(words) - 1),
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [tuple(item.split(",", 1)) for item in done.stdout.split()]


def _values(line, cwd=None):
    found = _completed(line, cwd)
    assert {kind for kind, _ in found} <= {"plain"}
    return [value for _, value in found]


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("chela-bench s", ["sweep", "show"]),
        ("chela-bench sweep --op s", ["softmax_attention", "short_long_conv", "softmax_layer"]),
        ("chela-bench sweep --op chela_layer,li", ["chela_layer,linear_attention"]),
        ("chela-bench sweep --impl triton_c", ["triton_chunked"]),
        (
            "chela-bench sweep --op short_long_conv --impl ",
            ["direct", "fft", "torch_rfft", "triton"],
        ),
        ("chela-bench sweep --shape s", ["small"]),
        ("chela-bench sweep --op chela_layer --shape b8", ["b8-t2k-d1024"]),
        ("chela-bench sweep --dtype b", ["bf16"]),
        ("chela-bench sweep --direction fwd,f", ["fwd,fwdbwd"]),
        (
            "chela-bench sweep --preset ",
            [
                "cpu",
                "attention",
                "convolution",
                "traffic",
                "layer",
                "crossover",
                "decode",
                "published",
            ],
        ),
        ("chela-bench sweep --device ", ["auto", "cpu", "cuda"]),
        ("chela-bench list --device c", ["cpu", "cuda"]),
        ("chela-bench doctor --device a", ["auto"]),
        ("chela-bench sweep --timer e", ["event"]),
        ("chela-bench sweep --hbm ", ["model", "ncu", "gpm", "auto"]),
        ("chela-bench profile so", ["softmax_attention", "softmax_layer"]),
        ("chela-bench profile linear_attention --impl triton_r", ["triton_recurrent"]),
        ("chela-bench completion ", ["bash", "zsh", "fish"]),
    ],
)
def test_values(line, values):
    assert _values(line) == values


def test_shapes_come_from_the_config_given(tmp_path):
    config = tiny_config(tmp_path)
    assert _values("chela-bench sweep --shape ", cwd=tmp_path) == ["tiny"]
    assert _values(f"chela-bench sweep --config {config} --shape ") == ["tiny"]


@pytest.mark.parametrize("option", ["--shape", "--preset"])
def test_a_broken_config_completes_nothing(tmp_path, option):
    (tmp_path / "bench.toml").write_text("schema = nonsense")
    assert _completed(f"chela-bench sweep {option} ", cwd=tmp_path) == []
    assert _values("chela-bench sweep --op ch", cwd=tmp_path) == ["chela_layer"]


def test_a_file_completes_where_no_name_does():
    assert _completed("chela-bench sweep --impl ./my") == [("file", "./my")]


def test_a_name_is_not_proposed_twice():
    assert "chunked,chunked" not in _values("chela-bench sweep --impl chunked,")


def test_several_gpus_are_numbered(monkeypatch):
    monkeypatch.setattr(nvml, "gpu_count", lambda: 2)
    context = SimpleNamespace(params={})
    found = [item.value for item in complete.devices(context, None, "cuda")]
    assert found == ["cuda", "cuda:0", "cuda:1"]


@pytest.mark.parametrize(
    ("line", "heavy"),
    [
        ("chela-bench ", {"torch", "pandas", "matplotlib", "pydantic", "rich"}),
        ("chela-bench sweep --impl ", {"torch", "pandas", "matplotlib"}),
    ],
)
def test_completing_imports_nothing_heavy(line, heavy):
    code = (
        "import sys, atexit; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); "
        "from chela_bench.cli import main; main()"
    )
    changes = {
        "_CHELA_BENCH_COMPLETE": "bash_complete",
        "COMP_WORDS": line,
        "COMP_CWORD": str(line.count(" ")),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(**changes), capture_output=True, text=True
    )
    assert done.stdout
    assert not heavy & set(done.stderr.split())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_for_the_shell(shell):
    done = in_this_process("completion", shell)
    assert done.returncode == 0
    assert f"_CHELA_BENCH_COMPLETE={shell}_complete" in done.stdout
    assert 'split ","' not in done.stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_by_the_script(tmp_path):
    program = tmp_path / "chela-bench"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m chela_bench "$@"\n')
    program.chmod(0o755)
    script = (
        'eval "$(chela-bench completion bash)"; '
        "COMP_WORDS=(chela-bench sweep --dtype fp32,b); COMP_CWORD=3; "
        '_chela_bench_completion chela-bench; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        env=environment(PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}"),
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["fp32,bf16"], done.stderr
