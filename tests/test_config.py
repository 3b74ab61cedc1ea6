"""bench.toml: every mistake names file, key, what was expected and what is allowed."""

from __future__ import annotations

import pytest

from chela_bench.bench.config import load_config
from chela_bench.errors import ConfigError
from tests.running import TINY


def _toml(tmp_path, text, name="bench.toml"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lens = ", "lenz = ", "sweep.lenz: unknown key; allowed here: ops, shapes, lens, dtypes"),
        ("lens = ", "lenz = ", "sweep.lens: missing"),
        ("seed = 3", 'seed = "three"', "sweep.seed: input should be a valid integer"),
        (
            'dtypes = ["fp32"]',
            'dtypes = ["fp23"]',
            "sweep.dtypes.0: input should be 'fp32', 'bf16'",
        ),
        ('dtypes = ["fp32"]', 'dtypes = "fp32"', "sweep.dtypes: input should be a valid list"),
        ("call_s = 0.5", "call_s = -1", "limits.call_s: input should be greater than 0; got -1"),
        ("call_s = 0.5", "call_s = nan", "limits.call_s: input should be a finite number"),
        ("call_s", "cal_s", "limits.cal_s: unknown key; allowed here: call_s, sample_s, build_s"),
        ("[limits]", "[limit]", "limit: unknown key; allowed here: schema, limits, sweep, shapes"),
        ("schema = 1", "schema = 2", "schema: input should be 1; got 2"),
        ("K = 16, V = 16", "K = 16, V = 1.5", "shapes.linear_attention.tiny.V: input should be a"),
        ("K = 16, V = 16", "K = 16", "shapes.linear_attention.tiny lacks V; it takes B, H, K, V"),
        ("K = 16, V = 16", "K = 16, V = 16, D = 4", "has D; it takes B, H, K, V"),
        ("K = 16, V = 16", "K = 0, V = 16", "input should be greater than or equal to 1; got 0"),
        ("[shapes.linear_attention]", "[shapes.linear]", "shapes.linear: no such op"),
        ("seed = 3", "seed = 3\nseed = 4", "is not TOML"),
        ("seed = 3", "seed = ", "is not TOML"),
        ("seed = 3", f"seed = {1 << 63}", "sweep.seed: input should be less than or equal to"),
        ("seed = 3", f"seed = -{1 << 63}", "sweep.seed: input should be greater than or equal to"),
        ("seed = 3", f"seed = {'9' * 5000}", "is not TOML"),
        ("seed = 3", f"seed = {'[' * 5000}{']' * 5000}", "is not TOML"),
        ("V = 16 }", f"V = {(1 << 30) + 1} }}", "tiny.V: input should be less than or equal to"),
        ("schema = 1", "schema = 1.0", "schema: input should be a whole number; got 1.0"),
        ("schema = 1", "schema = true", "schema: input should be a whole number; got True"),
        ("schema = 1", 'schema = "1"', "schema: input should be a whole number; got '1'"),
        ("call_s = 0.5", 'call_s = "0.5"', "limits.call_s: input should be a valid number"),
        ("call_s = 0.5", "call_s = true", "limits.call_s: input should be a valid number"),
        ("call_s = 0.5", "call_s = 604801", "input should be less than or equal to 604800"),
        (
            "phase_s = 20.0",
            "phase_s = 2.0",
            "limits: phase_s = 2 is too short for sampling: 4 call_s + sample_s = 2.1",
        ),
        ('["linear_attention"]', "[]", "sweep.ops: list should have at least 1 item"),
        ('["tiny"]', "[]", "sweep.shapes: list should have at least 1 item"),
        ('["fp32"]', "[]", "sweep.dtypes: list should have at least 1 item"),
        ('["fwd"]', "[]", "sweep.directions: list should have at least 1 item"),
        ('["linear_attention"]', '["lin"]', "sweep.ops: no op 'lin'; there are: linear_attention"),
        ('["tiny"]', '["huge"]', "sweep.shapes: no shape 'huge'; there are: tiny"),
        ('lens = "256"', 'lens = "8k..1k"', "sweep.lens '8k..1k' runs backwards"),
        ('lens = "256"', 'lens = ""', "sweep.lens '': '' is not a length"),
    ],
)
def test_a_mistake_in_bench_toml_names_file_key_and_what_is_allowed(tmp_path, old, new, message):
    assert old in TINY
    path = _toml(tmp_path, TINY.replace(old, new, 1))
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"\x00\xff\xfe\x80", "is not TOML"), (b"# nothing\n", "is empty")],
)
def test_a_file_that_is_no_configuration(tmp_path, content, message):
    with pytest.raises(ConfigError, match=message):
        load_config(_toml(tmp_path, content))


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("table", "line", "message"),
    [
        ("sweep", "ops = []", "sweep.ops: list should have at least 1 item"),
        ("sweep", 'ops = ["lin"]', "sweep.ops: no op 'lin'"),
        ("sweep", 'shapes = ["huge"]', "sweep.shapes: no shape 'huge'; there are: tiny"),
        ("sweep", 'lens = "1e3"', "sweep.lens '1e3': '1e3' is not a length"),
        ("sweep", "lenz = 1", "sweep.lenz: unknown key; allowed here: ops, shapes, lens"),
        ("limits", "call_s = -2.0", "limits.call_s: input should be greater than 0; got -2.0"),
        ("limits", 'call_s = "0.5"', "limits.call_s: input should be a valid number"),
        ("limits", "call_s = true", "limits.call_s: input should be a valid number"),
        ("limits", "call_s = 100.0", "limits: phase_s = 20 is too short for sampling"),
    ],
)
def test_a_mistake_in_a_preset_is_found_though_it_is_not_taken(tmp_path, table, line, message):
    path = _toml(tmp_path, f"{TINY}\n[presets.fast.{table}]\n{line}\n")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}: presets.fast.{message}")
