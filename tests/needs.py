"""What a test needs of the machine."""

import os

import pytest


def require(available: object, reason: str) -> None:
    """Skip the test when the machine lacks what it needs; fail in CI, where nothing may be skipped."""
    if available:
        return
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
