"""Fixtures of the fault engines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.kit import Program, shim


@pytest.fixture(scope="session")
def program(script: Path) -> Iterator[Program]:
    """Return the shipped program, ready to be started many times."""
    with Program(script) as running:
        yield running


@pytest.fixture(scope="session")
def shimmed(script: Path) -> Iterator[Program]:
    """Return the shipped program below the shim that counts boundaries."""
    with Program(script, preload=shim()) as running:
        yield running


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave all of it out of `make test-fast`."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker("slow")
