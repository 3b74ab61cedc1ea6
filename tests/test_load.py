"""Functions imported by name, from packages and from a user's files."""

from __future__ import annotations

import pytest

from chela_bench.bench.load import load
from chela_bench.errors import UsageError


def _file(folder, text, name="mine.py"):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text)
    return path


def test_a_function_of_a_package_and_of_a_file(tmp_path):
    path = _file(tmp_path, "def f():\n    return 7\n")
    assert load(f"{path}:f")() == 7
    assert load("chela_bench.bench.lengths:parse_lengths")("1k") == [1024]


@pytest.mark.parametrize("name", ["f", "SIZE", "nothing"])
def test_what_is_no_function_is_answered_with_those_there_are(tmp_path, name):
    path = _file(tmp_path, "SIZE = f = 4\ndef attention(): pass\ndef _hidden(): pass\n")
    with pytest.raises(UsageError) as error:
        load(f"{path}:{name}")
    assert str(error.value) == f"no function {name!r} in {path}; it has: attention"


def test_two_files_of_one_name_are_two_modules(tmp_path):
    """Classes and Triton's kernels are looked up by their module's name."""
    texts = {"a": "class C: pass\ndef f(): return 'a'\n", "b": "def f(): return 'b'\n"}
    first, second = (load(f"{_file(tmp_path / name, texts[name])}:f") for name in "ab")
    assert (first(), second()) == ("a", "b")
    assert first.__module__ != second.__module__
    assert load(f"{tmp_path / 'a' / 'mine.py'}:C").__module__ == first.__module__


def test_a_file_imports_what_lies_beside_it(tmp_path):
    _file(tmp_path, "SIZE = 64\n", name="beside_mine.py")
    path = _file(tmp_path, "from beside_mine import SIZE\ndef f(): return SIZE\n")
    assert load(f"{path}:f")() == 64


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("raise ValueError('not today')", "ValueError: not today"),
        ("def f(:", "SyntaxError"),
        ("import no_such_module_anywhere", "ModuleNotFoundError"),
    ],
)
def test_a_file_that_does_not_import_is_quoted(tmp_path, text, reason):
    path = _file(tmp_path, text)
    with pytest.raises(UsageError) as error:
        load(f"{path}:f")
    assert str(error.value).startswith(f"{path} does not import: {reason}")
