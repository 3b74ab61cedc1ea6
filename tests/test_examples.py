"""The examples that train and generate, run as a user runs them."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import sys

import pytest

from tests.running import ROOT

SHORT = ["--steps", "200", "--length", "128", "--batch", "16", "--d-model", "64"]
ON_CPU = ["--learning-rate", "0.01", "--device", "cpu"]


pytestmark = pytest.mark.usefixtures("one_thread")


def run(name, *arguments):
    """Everything that the example leaves behind, run by its name with these arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        return runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


@pytest.fixture(scope="module")
def training(one_thread, tmp_path_factory):
    """What a training of about ten seconds prints, and its folder."""
    folder = tmp_path_factory.mktemp("examples") / "model"
    with contextlib.redirect_stdout(io.StringIO()) as output:
        run("train_characters.py", folder, *SHORT, *ON_CPU)
    return output.getvalue(), folder


@pytest.fixture
def trained(training):
    return training[1]


def test_a_short_training_beats_counts_of_three_characters(training):
    """2.35 bits, seeds 0 and 1 within 0.01, where counts have 4.68, 3.44 and 2.59 (Python 3.11)."""
    output, folder = training
    bits = [float(x) for x in re.findall(r"(\d\.\d{3}) bits per held-out", output)]
    zeroth, first, second, *losses = bits
    assert zeroth > first > second > losses[-1] + 0.1
    assert losses == sorted(losses, reverse=True) and len(losses) == 4
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}


def test_the_text_is_the_same_at_every_run_and_has_no_paragraph_twice():
    example = runpy.run_path(str(ROOT / "examples" / "train_characters.py"))
    text = example["manual"]()
    assert text == example["manual"]() and len(text) > 100_000 and text.isascii()
    paragraphs = text.split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs)
    assert bytes(example["encode"](text).tolist()).decode() == text


@pytest.mark.parametrize("order", [0, 1, 2])
def test_counts_are_chances(order):
    """They sum to one, in contexts that were seen and in one that was not."""
    counted_bits = runpy.run_path(str(ROOT / "examples" / "train_characters.py"))["counted_bits"]
    for context in ("ab", "ca", "zz"):
        chances = [
            2 ** -counted_bits("abcabcababc", context[:order] + chr(c), order) for c in range(128)
        ]
        assert abs(sum(chances) - 1) < 1e-9
    assert (counted_bits("ab" * 99, "ab" * 9, order) < 0.1) == (order > 0)


def test_generates_the_same_text_again(trained, capsys):
    for seed in (0, 0, 1):
        run("generate_characters.py", trained, "--prompt", "The ", "--characters", 60,
            "--seed", seed, "--device", "cpu")  # fmt: skip
    first, again, other = re.findall("The .{60}\n", capsys.readouterr().out, re.DOTALL)
    assert first == again != other
    assert sum(c.isalpha() or c.isspace() for c in first) > 40


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["nowhere"], r"error: could not read nowhere/config\.json"),
        (["--prompt", ""], "error: wanted prompts .* got no tokens"),
        (["--characters", "500"], "error: wanted 0 to 124 new tokens after a prompt of 4"),
        (["--temperature", "-1", "--characters", "9"], "error: wanted a finite temperature"),
    ],
    ids=str,
)
def test_generating_explains(arguments, match, trained):
    folder = [] if arguments == ["nowhere"] else [trained]
    with pytest.raises(SystemExit, match=match):
        run("generate_characters.py", *folder, *arguments, "--device", "cpu")


@pytest.mark.parametrize(
    ("name", "arguments", "match"),
    [
        ("train_characters.py", ["--steps", "0"], "--steps: wanted 1 or more, got 0"),
        ("train_characters.py", ["--device", "tpu"], "invalid choice: 'tpu'"),
        ("generate_characters.py", ["--prompt", "é"], "--prompt: wanted ASCII, got 'é'"),
    ],
    ids=str,
)
def test_the_command_line_explains(name, arguments, match, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(name, tmp_path, *arguments)
    assert match in capsys.readouterr().err


def test_training_explains(tmp_path):
    with pytest.raises(SystemExit, match=r"error: wanted --length 2 to \d+, got 1"):
        run("train_characters.py", tmp_path, "--length", "1")
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"error: could not save the model in .*file"):
        run("train_characters.py", tmp_path / "file", "--steps", "1", *SHORT[2:], *ON_CPU)
