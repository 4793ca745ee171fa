"""Fixtures: a running shop for a whole module (`shop`), or a fresh one for a single test (`fresh_shop`)."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import shop as shops


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[shops.Shop]:
    with shops.opened(tmp_path_factory.mktemp("shop"), shops.QUICK) as opened:
        yield opened


@pytest.fixture
def fresh_shop(tmp_path: Path) -> Iterator[shops.Shop]:
    with shops.opened(tmp_path, shops.QUICK) as opened:
        yield opened
