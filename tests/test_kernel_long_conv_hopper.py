"""kernels/long_conv_hopper.py, _blocks.py, _rows.py and _spectrum.py, compiled without a GPU. On
one, every test of long convolutions runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from tests.running import ROOT


def test_every_kernel_compiles_for_hopper():
    """Two programs have room on an SM, for nothing else hides what one of them waits for."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    ended = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "long_conv_static.py"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    rows = re.findall(
        r"^(\S.*?) +N2 \d+ +(\w+) +\d+ registers +(\d+) stack +(\d+) KB .* HMMA (\d+)",
        ended.stdout, re.MULTILINE,
    )  # fmt: skip
    assert len(rows) == 12 + 2 + 4 + 4 + 3 + 6 + 3 + 1, ended.stdout
    for name, dtype, stack, shared, old_products in rows:
        assert int(shared) <= 113 and old_products == "0", ended.stdout
        if name.startswith("row") or name.endswith("blocks"):
            most = 224 if (name, dtype) == ("rows", "float16") else 136
            assert int(stack) <= most, ended.stdout
        if name.startswith("spectrum of"):
            assert stack == "0", ended.stdout
