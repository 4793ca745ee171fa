"""A whole receiver. Type: WEBHOOK_SECRET=… python3 receive.py 9000. It keeps what comes in events.db."""

import contextlib
import hashlib
import hmac
import http.server
import json
import os
import sqlite3
import sys
import traceback

SECRET = os.environ.get("WEBHOOK_SECRET", "").encode() or sys.exit("WEBHOOK_SECRET is missing")


def judge(body: bytes, signature: str) -> int:
    """Return the status to answer with. The signature is over the bytes, so check it before you parse them."""
    wanted = "sha256=" + hmac.new(SECRET, body, hashlib.sha256).hexdigest()
    if not hmac.compare_digest(wanted.encode(), signature.encode()):
        return 401
    try:
        keep(json.loads(body), body)
    except Exception:  # a full disk, for instance; the bridge sends the event again
        traceback.print_exc()
        return 500
    return 204


def keep(event: dict[str, str], body: bytes) -> None:
    """Store an event once, and commit before the answer."""
    with contextlib.closing(sqlite3.connect("events.db")) as db, db:
        db.execute("CREATE TABLE IF NOT EXISTS events (id TEXT PRIMARY KEY NOT NULL, body TEXT)")
        add = "INSERT INTO events VALUES (?, ?) ON CONFLICT (id) DO NOTHING"
        if db.execute(add, (event["event_id"], body.decode())).rowcount:
            print(event["event"], event["event_id"], json.dumps(event.get("message")), flush=True)


class Receiver(http.server.BaseHTTPRequestHandler):
    """Answers each POST."""

    def do_POST(self) -> None:
        """Read the body whole, judge it, and answer without a body."""
        length = self.headers.get("Content-Length", "0")
        status = 413
        if length.isdecimal() and int(length) <= 10_000_000:
            status = judge(self.rfile.read(int(length)), self.headers.get("X-Hub-Signature-256", ""))
        self.send_response(status)
        self.end_headers()


http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Receiver).serve_forever()
