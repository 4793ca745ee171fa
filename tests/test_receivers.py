"""The receivers of docs/receivers, each at the end of a running bridge's webhooks."""

import contextlib
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import playwright
import pytest
import requests

from crmbridge import signing
from crmbridge.config import ROOT
from tests.needs import require
from tests.shop import CUSTOMER, SHOP_ID, Shop
from tests.waiting import PATIENCE_S, until

SECRET = signing.make_secret()
TRY = ROOT / "docs" / "receivers" / "try.sh"
NODE = Path(playwright.__file__).parent / "driver" / "node"


def command(language: str, port: int) -> list[str]:
    """Return what the head of a receiver says to type, for a port."""
    receiver = str(ROOT / "docs" / "receivers" / f"receive.{language}")
    if language == "py":
        return [sys.executable, receiver, str(port)]
    if language == "js":
        return [str(NODE), receiver, str(port)]
    php = shutil.which("php")
    require(php, "needs php with pdo_sqlite")
    return [str(php), "-S", f"127.0.0.1:{port}", receiver]


@contextlib.contextmanager
def receiving(language: str, folder: Path) -> Iterator[str]:
    """Yield the URL of a running receiver that keeps its events in a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = {"WEBHOOK_SECRET": SECRET, "PATH": "/usr/bin:/bin"}
    with (folder / "receiver.log").open("wb") as log:
        words = command(language, port)
        process = subprocess.Popen(words, cwd=folder, env=environ, stdout=log, stderr=subprocess.STDOUT)
    try:

        def listens() -> bool:
            assert process.poll() is None, (folder / "receiver.log").read_text()
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", port)) == 0

        until(listens)
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


@pytest.mark.parametrize("language", ["py", "js", "php"])
def test_a_receiver_keeps_what_is_signed_once_and_answers_401_to_all_else(
    language: str, fresh_shop: Shop, tmp_path: Path
) -> None:
    shop = fresh_shop

    def kept() -> list[tuple[str, str]]:
        if not (tmp_path / "events.db").exists():
            return []
        with contextlib.closing(sqlite3.connect(tmp_path / "events.db")) as db:
            if not db.execute("SELECT 1 FROM sqlite_schema").fetchall():
                return []
            return db.execute("SELECT id, body FROM events ORDER BY rowid").fetchall()

    with receiving(language, tmp_path) as url:
        path = f"/api/v1/accounts/{shop.account_id}"
        change = {"crm_webhook_url": url, "webhook_secret": SECRET}
        assert shop.call("PUT", path, change, key=shop.admin_key).status_code == 200
        shop.meta.customer_says(SHOP_ID, CUSTOMER, "Is the lamp in stock? 💡")
        ((event_id, body),) = until(kept)
        shop.wait_rows("SELECT state, attempts FROM deliveries WHERE target = 'crm'", [("done", 1)])
        good = signing.hub_signature(SECRET, body.encode())

        def answer(body: bytes, **headers: str) -> int:
            return requests.post(url, body, headers=headers, timeout=PATIENCE_S).status_code

        words = ["sh", str(TRY), url]
        tried = subprocess.run(words, env={**os.environ, "WEBHOOK_SECRET": SECRET}, capture_output=True, check=False)
        assert tried.returncode == 0, tried.stdout
        assert answer(body.encode(), **{"X-Hub-Signature-256": "sha256=ü"}) == 401
        assert answer(b"[]", **{"X-Hub-Signature-256": signing.hub_signature(SECRET, b"[]")}) == 500
        assert answer(body.encode(), **{"X-Hub-Signature-256": good}) == 204
        shop.meta.customer_says(SHOP_ID, CUSTOMER, "and still there?")
        until(kept, lambda rows: len(rows) == 3)
    assert kept()[0] == (event_id, body)
    assert (tmp_path / "receiver.log").read_text().count(event_id) == 1
