"""A whole shop for tests: the bridge as a process of its own, the sandbox around it, an account and its keys."""

import contextlib
import os
import re
import secrets
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests

from crmbridge.sandbox import Sandbox
from crmbridge.sandbox.crm import WEBHOOK_SECRET
from crmbridge.sandbox.demo import Bridge, ini
from tests.waiting import PATIENCE_S, until

SHOP_ID, SHOP_SCOPED_ID = "17841400000000001", "24000000000000001"
OTHER_ID, OTHER_SCOPED_ID = "17841400000000002", "24000000000000002"
TOKEN, OTHER_TOKEN = "IGAAtokenofthefirstshop", "IGAAtokenofthesecondshop"
CUSTOMER = "900000000000001"
# Retries soon enough for a test, late enough to be seen.
QUICK = """
[delivery]
crm_quick_s = 0.3 0.3 0.3 0.3 0.3
crm_slow_s = 0.5
instagram_retry_s = 0.3 0.3 0.3
instagram_unavailable_s = 0.3
look_up_s = 0.3 0.7
probe_s = 0.3
"""


class Shop:
    """The bridge at `url`, its `sandbox`, and calls to its API with the right key."""

    def __init__(self, folder: Path, sandbox: Sandbox, settings: str = "", instagram: str = "") -> None:
        self.sandbox = sandbox
        self.meta, self.crm = sandbox.meta, sandbox.crm
        self.meta.add_account(SHOP_ID, token=TOKEN, app_scoped_id=SHOP_SCOPED_ID, username="your_shop")
        self.meta.add_account(OTHER_ID, token=OTHER_TOKEN, app_scoped_id=OTHER_SCOPED_ID, username="other_shop")
        configuration = ini(sandbox).replace("[instagram]\n", "[instagram]\n" + instagram) + settings
        self.bridge = Bridge(folder, configuration)
        self.bridge.command("init")
        self.admin_key = self.bridge.command("key", "create", "--name", "admin", "--admin")
        self.key = ""
        self.account_id = ""
        self.database = folder / "var" / "bridge.db"

    @property
    def url(self) -> str:
        return self.bridge.url

    def start(self, *words: str) -> None:
        """Start the server; other ``crmbridge`` words than ``serve`` may be given."""
        self.bridge.start(*words)
        self.meta.callback_url = f"{self.url}/webhooks/instagram"

    def kill(self) -> None:
        """End the server with SIGKILL."""
        process = self.bridge._process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()

    def connect(self, **changes: Any) -> Any:
        """Create the shop's account; keywords change or add fields of the request."""
        body = {
            "instagram_account_id": SHOP_ID,
            "username": "your_shop",
            "access_token": TOKEN,
            "crm_webhook_url": self.sandbox.crm_webhook_url,
            "webhook_secret": WEBHOOK_SECRET,
        }
        return self.call("POST", "/api/v1/accounts", {**body, **changes}, key=self.admin_key)

    def open(self) -> None:
        """Create the shop's account and a key bound to it."""
        answer = self.connect()
        assert answer.status_code == 201, answer.text
        self.account_id = answer.json()["account_id"]
        self.key = self.bridge.command("key", "create", "--name", "crm", "--account", self.account_id)

    def call(self, method: str, path: str, body: Any = None, *, key: str | None = None, **options: Any) -> Any:
        """Call the API with the CRM's key, or another."""
        headers = {"Authorization": f"Bearer {self.key if key is None else key}", **options.pop("headers", {})}
        return requests.request(method, self.url + path, json=body, headers=headers, timeout=PATIENCE_S, **options)

    def hears(self, customer: str, text: str, **more: Any) -> None:
        """Have a customer write, and Meta tell it again until it is acknowledged: a slow disk may cost it a 503."""
        told = {"mid": f"mid-{secrets.token_hex(12)}", **more}

        def acknowledged(status: int) -> bool:
            assert status in (200, 503)
            return status == 200

        until(lambda: self.meta.customer_says(SHOP_ID, customer, text, **told).status, acknowledged)

    def send(self, text: str, idempotency_key: str, /, **more: Any) -> Any:
        """Send a message as the CRM would."""
        body = {
            "account_id": self.account_id,
            "recipient_id": CUSTOMER,
            "message": text,
            "idempotency_key": idempotency_key,
            **more,
        }
        return self.call("POST", "/api/v1/messages/send", body)

    def lose(self, text: str, contact: str = CUSTOMER) -> None:
        """Have a customer write what the CRM does not take until it is given up; scripted answers are forgotten."""
        self.crm.answer(500, times=1000, containing=f'"{text}"')
        self.meta.customer_says(SHOP_ID, contact, text)
        came = self.crm.wait(1, where=lambda entry: entry.event.get("message") == text)
        this = f"event_id = '{came[0].event['event_id']}'"
        self.change("UPDATE endpoints SET aged_from = '2020-01-01T00:00:00.000Z' WHERE kind = 'crm'")
        self.change(f"UPDATE deliveries SET aged_from = '2020-01-01T00:00:00.000Z' WHERE {this}")
        self.wait_rows(f"SELECT state FROM deliveries WHERE {this}", [("dead",)])
        self.crm.clear_answers()

    def status(self, message_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.call("GET", f"/api/v1/messages/{message_id}/status").json()
        return found

    def wait_status(self, message_id: str, *wanted: str) -> None:
        """Wait until a message has one of these statuses: that Instagram took it is recorded a moment after."""
        until(lambda: self.status(message_id), lambda found: found["status"] in wanted)

    def rows(self, sql: str, *parameters: Any) -> list[Any]:
        """Read the database as an operator would."""
        with contextlib.closing(sqlite3.connect(self.database)) as connection:
            return connection.execute(sql, parameters).fetchall()

    def change(self, sql: str) -> None:
        """Change the database behind the server's back."""
        with contextlib.closing(sqlite3.connect(self.database)) as connection, connection:
            connection.execute(sql)

    def wait_rows(self, sql: str, wanted: list[Any], timeout_s: float = PATIENCE_S) -> None:
        """Wait until a query finds what is wanted."""
        until(lambda: self.rows(sql), lambda found: found == wanted, timeout_s=timeout_s)

    def log(self) -> str:
        return self.bridge.log_path.read_text()

    def wait_log(self, pattern: str) -> str:
        """Return the first log line that matches, once it is written."""

        def lines() -> list[str]:
            return self.log().splitlines()

        seen = until(lines, lambda lines: any(re.search(pattern, line) for line in lines))
        return next(line for line in seen if re.search(pattern, line))

    def close(self) -> None:
        self.bridge.stop()


@contextlib.contextmanager
def opened(
    folder: Path, settings: str = "", *, instagram: str = "", account: bool = True, **environ: str
) -> Iterator[Shop]:
    """Yield a running shop, with its account connected unless told otherwise.

    `settings` are sections to add, `instagram` lines for the section that is there, `environ` what overrides them.
    """
    with Sandbox() as sandbox:
        shop = Shop(folder, sandbox, settings, instagram)
        shop.bridge.environ |= environ
        try:
            shop.start()
            if account:
                shop.open()
            yield shop
        finally:
            shop.close()
