"""The peer that torch.compile makes: a C++ compiler takes most of a minute."""

from __future__ import annotations

from tests.running import swept, tiny_config


def test_the_compiled_peer_is_right_on_the_cpu(tmp_path):
    done, document = swept(
        "--impl", "compiled_chunked", "--lens", "100", "--direction", "fwd,bwd,fwdbwd",
        config=tiny_config(tmp_path, build_s=120.0),
    )  # fmt: skip
    outcomes = {p["direction"]: p["outcome"] for p in document["points"]}
    assert outcomes == {"fwd": "ok", "bwd": "skipped", "fwdbwd": "ok"}, done.stderr
