"""Loads the fixture where the package is not installed, only on the path."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    from chela_bench.bench import pytest_plugin

    if not config.pluginmanager.is_registered(pytest_plugin):
        config.pluginmanager.register(pytest_plugin, "chela_bench")
