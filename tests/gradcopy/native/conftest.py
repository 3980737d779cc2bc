"""The compiled loop, built once per test process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gradcopy.native import building
from trainfix.gradcopy import native


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds the package `trainfix_native`, built with a warning being an error."""
    missing = building.lacks()
    if missing:
        pytest.skip(missing)
    return building.build(tmp_path_factory.mktemp("native"), "-Wall", "-Wextra", "-Werror")


@pytest.fixture(scope="session")
def adder(built: Path) -> native.NativeAdder:
    with building.found(built):
        found = native.adder()
    assert isinstance(found, native.NativeAdder)
    return found
