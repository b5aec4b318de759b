"""Every example in a docstring of loha_core gives what it says, but those that need files (`+SKIP`)."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import loha_core

NAMES = ["loha_core", *(module.name for module in pkgutil.walk_packages(loha_core.__path__, "loha_core."))]


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("__main__")])
def test_examples_of(name: str) -> None:
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0
