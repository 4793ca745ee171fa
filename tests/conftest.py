"""Fixtures: a running shop for a module (`shop`) or a test (`fresh_shop`), rooms on a set clock (`rig`), a browser."""

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests import rig as rigs
from tests import shop as shops
from tests import spec
from tests.needs import require

# How long an example takes to make and to try is the machine's.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="session", autouse=True)
def _spec() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        spec.attach(patch)
        yield


@pytest.fixture(autouse=True)
def _as_documented() -> Iterator[None]:
    """Fail a test in which an answer or a CRM's event is not as api-spec.yaml describes it."""
    yield
    found = spec.problems()
    assert not found, "\n".join(found)


@pytest.fixture(scope="module", autouse=True)
def _nothing_left_open() -> Iterator[None]:
    """Have what a module's tests left open be reported here, not in a test that happens to meet it."""
    yield
    gc.collect()


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


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium")
    require(chromium, "there is no chromium; on Debian: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        yield launched
        launched.close()
