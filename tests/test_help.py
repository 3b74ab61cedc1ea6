"""Every command's --help ends with examples, and every example runs as it stands there.

All but the card's and the compiler's own part is real: workers of a steady card stand for a GPU,
ncu is a fake, and what would be compiled fits. An example finds its folders in a place of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import shlex
import shutil
from functools import cache, partial
from pathlib import Path

import click
import pytest

from chela_bench import cli
from chela_bench.bench import atlas, live, profiling, runner, tables
from chela_bench.cli import derived
from chela_bench.reports.figures import figures
from tests.records import atlas_json, pytest_json, timed
from tests.running import ROOT, TINY, in_this_process
from tests.test_atlas_reports import make_row
from tests.test_ncu import install

WORKER = (Path(__file__).resolve().parent / "steady_worker.py").read_text()
CONFIG = (
    TINY.replace(
        "[shapes.long_conv]", "[shapes.long_conv]\nb8-t4k-d1024 = { B = 2, T = 64, D = 8 }"
    )
    + '[presets.attention.sweep]\nops = ["linear_attention"]\n'
)
TIME = "linear_attention-fwd-fp32-B1-H2-K16-V16-time"


def commands():
    """Words and help of every command and subcommand."""

    def walk(command, context, words):
        yield words, command.get_help(context)
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                inner = command.get_command(context, name)
                below = click.Context(inner, info_name=name, parent=context, max_content_width=100)
                yield from walk(inner, below, (*words, name))

    settings = {**cli.cli.context_settings, "max_content_width": 100}
    top = click.Context(cli.cli, info_name="chela-bench", **settings)
    return dict(walk(cli.cli, top, ("chela-bench",)))


@cache
def examples():
    """By command: its examples, a line that ends with a backslash joined to the next."""
    found = {}
    for words, text in commands().items():
        block = text.partition("Example")[2].partition("\n\n")[0].partition(":")[2]
        lines = [line.strip() for line in block.replace("\\\n", " ").splitlines()]
        found[words] = [" ".join(line.split()) for line in lines if line]
    return found


ALL = [example for some in examples().values() for example in some]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_has_an_example(words):
    assert examples()[words], "add `Example:` or `Examples:` to its docstring"
    for example in examples()[words]:
        assert tuple(shlex.split(example)[: len(words)]) == words
    assert all(len(line) <= 100 for line in commands()[words].splitlines())


def compile_nothing(cases, archs, options, **_):
    """As bench.atlas.compile_all, of kernels that all fit."""
    found = atlas.Found(triton="3.7.1")
    for arch, case in itertools.product(archs, cases):
        row = make_row(
            op=case.op, impl=case.impl, arch=arch, asked=[case.config], lens=[case.shape["T"]],
            config={**case.config, "num_warps": 4},
        )  # fmt: skip
        found.by_case.setdefault(arch, {}).setdefault(case.key, []).append(len(found.rows))
        found.rows.append(row)
    return found


def a_steady_card(patch, folder):
    """A card, ncu, a compiler, two revisions; and nothing but times is drawn."""
    for name in ("gate", "noise", "profile", "sweep", "tune", "turns"):
        module = importlib.import_module(f"chela_bench.cli.{name}")
        patch.setattr(module, "choose_device", lambda wanted: "cuda")
    patch.setattr(runner, "_WORKER", WORKER)
    patch.setattr(profiling, "_START_S", 1.0)
    patch.setattr(atlas, "compile_all", compile_nothing)
    patch.setattr(tables, "TABLE", folder / "tuned.json")
    here = contextlib.nullcontext([str(ROOT), str(ROOT)])
    patch.setattr(live, "checkouts", lambda revisions: here)
    patch.setattr(derived, "figures", lambda *_, **__: {})
    install(folder / "bin", patch)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A folder with all that examples name, made by the commands themselves."""
    folder = tmp_path_factory.mktemp("template")
    (folder / "bench.toml").write_text(CONFIG)
    shutil.copy(ROOT / "examples" / "my_kernel.py", folder)
    shutil.copy(ROOT / "tests/fixtures/ncu-2025.3.1-h100-raw.csv", folder / "capture.csv")
    pytest_json(folder / "now.json", [timed(T) for T in (1024, 2048)])
    atlas_json(folder / "atlas.json")

    def made(*arguments, run=None):
        before = set(folder.glob("runs/*"))
        done = in_this_process(*arguments, cwd=folder, PATH=os.environ["PATH"])
        assert done.returncode == 0, done.stderr
        if run is not None:
            [new] = set(folder.glob("runs/*")) - before
            new.rename(folder / "runs" / run)

    with pytest.MonkeyPatch.context() as patch:
        a_steady_card(patch, folder)
        for run in ("RUN", "BEFORE", "AFTER"):
            made("sweep", "--impl", "chunked,quadratic", "--lens", "256,512", run=run)
        made("tune", "linear_attention", "--axis", "BLOCK_V=16,32", run="TUNED")
        made("baseline", "save", "runs/RUN", "--name", "2025-12")
        made("baseline", "save", "now.json", "--name", "2025-12")
        for machine in (folder / "baselines").iterdir():
            made("baseline", "promote", "2025-12", "--machine", machine.name)
        made("baseline", "save", "runs/BEFORE", "--name", "2026-02")
    return folder


@pytest.mark.parametrize("example", dict.fromkeys(ALL))
def test_an_example_runs(example, template, tmp_path, monkeypatch):
    place = shutil.copytree(template, tmp_path / "place")
    a_steady_card(monkeypatch, tmp_path)
    words = shlex.split(example)
    if words[1] == "report":
        monkeypatch.setattr(derived, "figures", partial(figures, only=[TIME]))
    done = in_this_process(*words[1:], cwd=place, PATH=os.environ["PATH"], NO_COLOR="1")
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.strip()
    assert "Traceback" not in done.stderr
    if "--format" in words:
        out = place / words[words.index("-o") + 1]
        kinds = words[words.index("--format") + 1].split(",")
        name = {"report": TIME, "compare": "comparison"}[words[1]]
        assert all((out / f"{name}.{kind}").stat().st_size > 1000 for kind in kinds)
