"""Fixtures: a running shop for a module (`shop`) or one test (`fresh_shop`), and the rooms on a set clock (`rig`)."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import rig as rigs
from tests import shop as shops


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[shops.Shop]:
    with shops.opened(tmp_path_factory.mktemp("shop"), shops.QUICK) as opened:
        yield opened


@pytest.fixture
def fresh_shop(tmp_path: Path) -> Iterator[shops.Shop]:
    with shops.opened(tmp_path, shops.QUICK) as opened:
        yield opened


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[rigs.Rig]:
    with rigs.opened(tmp_path) as opened:
        yield opened
