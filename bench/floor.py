"""What no bridge can be faster than: ``python -m bench.floor KIND PORT FOLDER`` answers each POST with 200.

`plain` is bare Waitress and Bottle; `commit` also makes two rows durable in one commit behind one lock; `canned` reads
no more than it must, and shows what the generator can do.
"""

import asyncio
import logging
import re
import sqlite3
import sys
import threading
from pathlib import Path

_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def _bare(port: int, folder: Path, *, commits: bool) -> None:
    import bottle
    import waitress

    logging.getLogger("waitress").setLevel(logging.ERROR)
    app, lock = bottle.Bottle(), threading.Lock()
    db = sqlite3.connect(folder / "floor.db", isolation_level=None, check_same_thread=False)
    for sql in ("PRAGMA journal_mode = wal", "PRAGMA synchronous = full", "CREATE TABLE one (body)"):
        db.execute(sql)

    @app.post("/")  # type: ignore[untyped-decorator]
    def keep() -> str:
        body = bottle.request.body.read()
        if commits:
            with lock:
                db.execute("BEGIN IMMEDIATE")
                for _ in range(2):
                    db.execute("INSERT INTO one (body) VALUES (?)", (body,))
                db.execute("COMMIT")
        return "ok"

    waitress.serve(app, listen=f"127.0.0.1:{port}", threads=8, asyncore_use_poll=True)


class _Canned(asyncio.Protocol):
    came = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.came += data
        head, end, body = self.came.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if end and length and len(body) >= int(length[1]):
            self.came = b""
            self.transport.write(_ANSWER)


async def _canned(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(_Canned, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    kind, port, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    if kind == "canned":
        asyncio.run(_canned(port))
    else:
        _bare(port, folder, commits=kind == "commit")
