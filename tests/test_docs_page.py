"""The documentation page in a real browser: it loads cleanly, asks no other host, and Try it out works with a key."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.shop import Shop
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.browser


class Visit:
    """A page that records what its console says and which hosts it asks; other hosts than ours are cut off."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.complaints: list[str] = []
        self.others: list[str] = []
        self.failed: list[str] = []
        self._host = urlsplit(url).netloc
        self.page = browser.new_page(base_url=url, viewport={"width": 1280, "height": 1000}, **options)
        self.page.set_default_timeout(PATIENCE_S * 1000)
        self.page.route("**/*", self._route)
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("requestfailed", lambda request: self.failed.append(request.url))
        self.page.on("response", lambda answer: self.failed.append(answer.url) if answer.status >= 400 else None)

    def _route(self, route: Any) -> None:
        url = urlsplit(route.request.url)
        if url.scheme in ("data", "blob") or url.netloc == self._host:
            route.continue_()
        else:
            self.others.append(route.request.url)
            route.abort()

    def _hear(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.type}: {message.text}")

    def assert_clean(self) -> None:
        assert (self.complaints, self.others, self.failed) == ([], [], [])


@pytest.fixture
def visit(browser: Any, shop: Shop) -> Iterator[Visit]:
    visit = Visit(browser, shop.url)
    yield visit
    visit.page.close()


def test_the_root_leads_to_a_page_that_loads_cleanly(visit: Visit) -> None:
    visit.page.goto("/")
    assert urlsplit(visit.page.url).path == "/docs"
    visit.page.get_by_role("heading", name="crmbridge API").wait_for()
    for operation in ("sendMessage", "listAccounts", "onMessageReceived", "receiveInstagramWebhook"):
        assert visit.page.locator(f"[id$='-{operation}']").count() == 1
    visit.page.wait_for_load_state("networkidle")
    visit.assert_clean()


def test_operations_webhooks_and_schemas_open_without_a_complaint(visit: Visit) -> None:
    visit.page.goto("/docs")
    for operation in ("sendMessage", "createAccount", "onMessageReceived"):
        block = visit.page.locator(f"[id$='-{operation}']")
        block.locator(".opblock-summary-control").click()
        block.locator(".responses-wrapper").wait_for()
    assert visit.page.get_by_text("idempotency_conflict").count() > 1  # beside a reference to what all errors share
    visit.page.locator(".models").get_by_text("MessageStatusEvent").first.wait_for()
    assert visit.page.get_by_text("Could not resolve reference").count() == 0
    assert visit.page.locator(".errors-wrapper").count() == 0
    visit.assert_clean()


def try_a_key(visit: Visit, shop: Shop) -> None:
    """Type the shop's key in and try an operation with it."""
    page = visit.page
    page.goto("/docs")
    page.get_by_role("button", name="Authorize").first.click()
    dialog = page.locator(".dialog-ux")
    dialog.get_by_role("textbox").fill(shop.key)
    dialog.get_by_role("button", name="Apply credentials").click()
    dialog.get_by_role("button", name="Close").last.click()

    operation = page.locator("[id$='-listAccounts']")
    operation.locator(".opblock-summary-control").click()
    operation.get_by_role("button", name="Execute").click()
    answer = operation.locator(".live-responses-table .response")
    answer.wait_for()
    assert answer.locator(".response-col_status").inner_text().split() == ["200"]
    assert shop.account_id in answer.inner_text()
    visit.assert_clean()


def test_a_key_typed_in_lets_an_operation_be_tried(visit: Visit, shop: Shop) -> None:
    try_a_key(visit, shop)


def test_without_a_key_the_refusal_is_shown(visit: Visit) -> None:
    page = visit.page
    page.goto("/docs")
    operation = page.locator("[id$='-listAccounts']")
    operation.locator(".opblock-summary-control").click()
    operation.get_by_role("button", name="Execute").click()
    answer = operation.locator(".live-responses-table .response")
    answer.wait_for()
    assert answer.locator(".response-col_status").inner_text().split()[0] == "401"
    assert '"unauthorized"' in answer.inner_text()
