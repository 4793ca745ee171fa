"""The mark of a test that runs on every Debian there is a box of."""

import pytest

from tests.appliance.box import SUITES

on_both = pytest.mark.parametrize("suite", SUITES, indirect=True)
