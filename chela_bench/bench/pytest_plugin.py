"""The pytest plugin: `chela_benchmark`, on pytest-benchmark's table, JSON and storage.

Entry point of group pytest11. Starting pytest imports this file alone: no torch, none of the
package's other modules, and without pytest-benchmark nothing but the fixture's refusal.
"""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("chela-bench")
    group.addoption(
        "--chela-device", default="auto", help="auto, cpu, cuda or cuda:N [default: auto]."
    )
    group.addoption(
        "--chela-config", default=None, help="Another bench.toml, for the limits of a point."
    )


def pytest_configure(config: pytest.Config) -> None:
    names = ("benchmark", "pytest_benchmark", "pytest_benchmark.plugin")
    if any(config.pluginmanager.hasplugin(name) for name in names):
        from chela_bench.bench.pytest_fixture import Plugin

        config.pluginmanager.register(Plugin(config), "chela-bench-fixture")
    else:
        config.pluginmanager.register(_Without(), "chela-bench-fixture")


class _Without:
    """pytest-benchmark is not there."""

    @pytest.fixture
    def chela_benchmark(self) -> None:
        """Needs pytest-benchmark."""
        pytest.fail(
            "chela_benchmark needs pytest-benchmark: pip install -e '.[pytest]' in the checkout",
            pytrace=False,
        )
