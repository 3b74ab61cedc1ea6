"""docs/ci: valid workflows, whose every command this command line takes."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import click
import pytest

from chela_bench import cli
from tests.running import ROOT, environment

FILES = sorted((ROOT / "docs" / "ci").glob("*.yml"))
yaml = pytest.importorskip("ruamel.yaml", reason="check-jsonschema is not installed")


def workflow(path):
    return yaml.YAML(typ="safe").load(path.read_text())


def commands(path):
    """Every command of every step, its variables put in."""
    for job in workflow(path)["jobs"].values():
        for step in job["steps"]:
            for line in step.get("run", "").splitlines():
                yield shlex.split(re.sub(r"\$\{?[A-Z]+\}?", "main", line).partition(" > ")[0])


def test_there_is_one_with_a_gpu_and_one_without():
    assert [path.name for path in FILES] == ["gpu.yml", "static.yml"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_github_would_take_it(path):
    words = [sys.executable, "-m", "check_jsonschema", "--builtin-schema",
             "vendor.github-workflows", str(path)]  # fmt: skip
    done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_our_commands_take_these_arguments(path):
    ours = [words for words in commands(path) if words and words[0] == "chela-bench"]
    assert {"gate"} <= {words[1] for words in ours}
    context = click.Context(cli.cli, info_name="chela-bench")
    for _, name, *arguments in ours:
        if name == "atlas" and name not in cli.COMMANDS:
            continue
        command = cli.cli.get_command(context, name)
        assert command is not None, name
        command.make_context(name, arguments, parent=context)


def test_a_flag_that_is_gone_would_be_found():
    command = cli.cli.get_command(click.Context(cli.cli), "gate")
    with pytest.raises(click.NoSuchOption):
        command.make_context("gate", ["--base", "x", "--frobnicate"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_runs_end_and_have_no_rights_to_write(path):
    found = workflow(path)
    assert found["permissions"] == {"contents": "read"}
    assert all(job["timeout-minutes"] <= 60 for job in found["jobs"].values())
