"""Boxes for the tests of the appliance."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.appliance.box import Box, why_not


@pytest.fixture(scope="session", autouse=True)
def boxes_can_be_made() -> None:
    """Skip with the reason where no box can be made; in CI that is a failure."""
    reason = why_not()
    if reason and os.environ.get("CI"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    """An empty Debian with OpenRC, not booted, bounded to 1 GB, with no network but loopback."""
    made = Box(tmp_path / "box", memory_mb=1024)
    yield made
    made.close()
