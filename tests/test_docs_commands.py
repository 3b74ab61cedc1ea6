"""Every command and every Python block of README.md and the tutorial runs, on a CPU, in order.

A page is one shell session: files that it shows are written, commands run, exit codes are those
that it says. `bench.toml` is the project's with fewer samples, so that it takes seconds. What
cannot run is in NOT_RUN with the reason; a name there that no page shows any more fails.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from chela_bench import cli
from tests.docs_blocks import OUTPUT, Block, Command, blocks, commands
from tests.running import ROOT, environment

PAGES = [ROOT / "README.md", ROOT / "docs" / "tutorial.md"]
DOCS = [*PAGES, ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
DOCS += (ROOT / "docs" / "how-to").glob("*.md")
# Three samples a point; no call of a busy machine is too long.
QUICK = "sample_s = 0.02\ncall_s = 30.0\nbuild_s = 300.0\nphase_s = 300.0\n"
LIMIT_S = 600.0  # of a page; on free cores it takes 20 to 40 s

NOT_RUN = {
    "make sweep": "installs, then minutes; see test_make_knows_what_pages_ask_of_it",
    "make test": "runs this; likewise",
    "make .venv": "installs; likewise",
    "source .venv/bin/activate": "the tests' own Python stands for it",
}
MAKES = {"sweep": "-m chela_bench sweep", "test": "-m pytest", ".venv": "-m pip install"}


def shown(path: Path) -> list[tuple[Block, list[Command]]]:
    return [
        (block, list(commands(block.text)) if block.language == "sh" else [])
        for block in blocks(path)
    ]


def script(path: Path) -> str:
    """The page as one bash script that ends at the first thing that is not as it says."""
    lines = ["set -u"]
    for block, found in shown(path):
        if block.language == "sh":
            for command in found:
                if command.line not in NOT_RUN:
                    lines += [
                        f"echo {shlex.quote('+ ' + command.line)}",
                        command.line,
                        f"code=$?; [ $code = {command.exit_code} ] || {{ echo wanted exit code "
                        f"{command.exit_code}, got $code; exit 99; }}",
                    ]
        elif block.file is not None:
            lines += [f"mkdir -p $(dirname {block.file})", f"cat > {block.file} <<'END OF FILE'"]
            lines += [block.text + "END OF FILE"]
        elif block.language == "python":
            lines += ["echo + python", "python - <<'END OF FILE' || exit 99"]
            lines += [block.text + "END OF FILE"]
    return "\n".join(lines) + "\n"


@pytest.fixture
def home(tmp_path):
    """A user's home, with our command line on the path and quick settings where pages work."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, arguments in {
        "chela-bench": "-m chela_bench",
        "pytest": "-m pytest",
        "python": "",
    }.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {arguments} "$@"\n')
        (programs / name).chmod(0o755)
    shipped = (ROOT / "bench.toml").read_text()
    quick, found = re.subn(r"(?<=\[presets\.cpu\.limits\]\n)(\w+ = .+\n)+", QUICK, shipped)
    assert found == 1
    for folder in (tmp_path, tmp_path / "my-kernels"):
        folder.mkdir(exist_ok=True)
        (folder / "bench.toml").write_text(quick)
    return tmp_path


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_command_of_a_page_does_what_it_says(path, home):
    done = subprocess.run(
        ["bash"],
        input=script(path),
        cwd=home,
        env=environment(
            HOME=str(home),
            PATH=os.pathsep.join([str(home / "bin"), os.environ["PATH"]]),
            XDG_CACHE_HOME=str(home / "cache"),
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    ran = [line for line in done.stdout.splitlines() if line.startswith("+ ")]
    wanted = [f"+ {command.line}" for _, found in shown(path) for command in found]
    assert [line for line in ran if line != "+ python"] == [
        line for line in wanted if line[2:] not in NOT_RUN
    ]
    assert wanted, f"{path.name} shows no command"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_no_block_is_of_a_language_that_is_left_out(path):
    for block, _ in shown(path):
        named_file = block.language == "yaml" and block.file is not None
        assert block.language in {"sh", "python", OUTPUT} or named_file, block


def test_what_is_not_run_is_shown_somewhere():
    lines = {command.line for path in PAGES for _, found in shown(path) for command in found}
    assert NOT_RUN.keys() <= lines


@pytest.mark.parametrize("target", MAKES)
def test_make_knows_what_pages_ask_of_it(target):
    assert f"make {target}" in NOT_RUN
    recipe = subprocess.run(
        ["make", "-n", "-B", "--no-print-directory", target],
        cwd=ROOT, capture_output=True, text=True,
        env={name: value for name, value in os.environ.items() if name != "MAKEFLAGS"},
    )  # fmt: skip
    assert recipe.returncode == 0, recipe.stderr
    assert MAKES[target] in recipe.stdout


def test_the_tutorials_workflow_runs_what_the_tutorial_ran():
    yaml = pytest.importorskip("ruamel.yaml", reason="check-jsonschema is not installed")
    tutorial = ROOT / "docs" / "tutorial.md"
    found = shown(tutorial)
    [flow] = [block.text for block, _ in found if block.language == "yaml"]
    [job] = yaml.YAML(typ="safe").load(flow)["jobs"].values()
    runs = [step["run"] for step in job["steps"] if "run" in step]
    ours = [line for line in runs if line.startswith("chela-bench")]
    assert len(ours) == 2
    assert set(ours) <= {command.line for _, commands in found for command in commands}


def our_commands():
    for path in DOCS:
        for block, found in shown(path):
            if block.language == "sh":
                for command in found:
                    words = shlex.split(command.line.partition(" > ")[0], comments=True)
                    while words and "=" in words[0]:  # TRITON_INTERPRET=1
                        words.pop(0)
                    if words[:1] == ["chela-bench"]:
                        yield path.name, words[1:]


def test_every_page_gives_options_that_there_are():
    """In how-tos too, whose commands may want a GPU, minutes or another machine."""
    group = click.Context(cli.cli, info_name="chela-bench")
    names = set()
    for page, (name, *arguments) in our_commands():
        names.add(name)
        command = cli.cli.get_command(group, name)
        assert command is not None, f"{page}: no command {name}"
        try:
            command.make_context(name, list(arguments), parent=group)
        except click.UsageError as error:
            pytest.fail(f"{page}: chela-bench {name} {shlex.join(arguments)}: {error}")
    assert {"sweep", "atlas", "gate", "tune", "profile"} <= names


def within_lines(path, first):
    """Commands in the midst of a sentence that begin with this word."""
    for span in re.findall(rf"(?<!`)`{first} ([^`]+)`(?!`)", path.read_text()):
        yield shlex.split(span)


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_sentences_name_commands_and_options_that_there_are(path):
    group = click.Context(cli.cli, info_name="chela-bench")
    for name, *words in within_lines(path, "chela-bench"):
        command = cli.cli.get_command(group, name)
        assert command is not None, f"no command {name}"
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in within_lines(path, "make"):
        assert {word for word in words if "=" not in word} <= targets


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a b  # exits with 3\n", [("a b", 3)]),
        ("a \\\n    b\n# only words\n\nc   # words\n", [("a b", 0), ("c", 0)]),
        ("echo 'a#b'\n", [("echo 'a#b'", 0)]),
    ],
)
def test_commands_of_a_block(text, found):
    assert list(commands(text)) == found


def test_blocks_of_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "words\n\n    a b\n    c\n\n```python\n# x.py\n1\n```\n"
        "1. words\n\n   ```text\n   out\n   ```\n"
    )
    found = list(blocks(page))
    assert found == [
        Block("sh", "a b\nc\n"),
        Block("python", "# x.py\n1\n"),
        Block("text", "out\n"),
    ]
    assert [block.file for block in found] == [None, "x.py", None]
    page.write_text("```sh\na\n")
    with pytest.raises(ValueError, match="not closed"):
        list(blocks(page))
