"""crmbridge as installed on a server, in a box, with a shop around it: what tests of the service drive."""

import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from crmbridge.sandbox.crm import WEBHOOK_SECRET
from tests.appliance.box import Box, Layer
from tests.waiting import until

LOG = "/var/log/crmbridge/crmbridge.log"
INI = "/etc/crmbridge/crmbridge.ini"
DATA = "/var/lib/crmbridge"
URL, SANDBOX = "http://127.0.0.1:8080", "http://127.0.0.1:8090"
SHOP, CUSTOMER, TOKEN = "17841400000000001", "900000000000001", "IGAA-sandbox-token"
# Settings of conf.d that make a supervisor quick enough for a test.
SOON = ("respawn_delay=1", "healthcheck_delay=2", "healthcheck_timer=2", "retry=TERM/1/KILL/5")


class Shop:
    """A box with the service in it, `crmbridge sandbox` beside it, and the calls of a CRM and a customer."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self.key = self.admin_key = self.account_id = ""
        self.sandbox: subprocess.Popen[bytes] | None = None

    @property
    def ini(self) -> Path:
        """The configuration, as seen from outside until the next reboot."""
        return self.box.root / INI.lstrip("/")

    def configure(self, **changes: str) -> None:
        """Change keys of the ini, named section__key; and lead it to the sandbox."""
        text = self.ini.read_text()
        wanted = {
            "instagram__graph_url": f"{SANDBOX}/v27.0",
            "instagram__app_secrets": "sandbox-app-secret",
            "instagram__verify_token": "sandbox-verify-token",
            "crm__allow_http": "true",
            "crm__allow_networks": "127.0.0.0/8",
        } | changes
        for name, value in wanted.items():
            section, _, key = name.partition("__")
            head, mark, rest = text.partition(f"[{section}]\n")
            lines = rest.splitlines(keepends=True)
            at = next(i for i, line in enumerate(lines) if line.startswith(f"{key} ="))
            lines[at] = f"{key} = {value}\n"
            text = head + mark + "".join(lines)
        self.ini.write_text(text)

    def conf_d(self, *lines: str) -> None:
        """Put lines at the end of conf.d/crmbridge."""
        with (self.box.root / "etc" / "conf.d" / "crmbridge").open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))

    def rc(self, *words: str, check: bool = True, service: str = "crmbridge") -> str:
        """Run rc-service on it and return what it said."""
        return self.box.run("rc-service", service, *words, check=check).stdout

    def ask(self, method: str, url: str, body: Any = None, key: str = "") -> Any:
        """Return what a URL inside answers, as JSON; None when nothing or no JSON comes."""
        words = ["curl", "-sS", "--max-time", "60", "-X", method, url, "-H", "Content-Type: application/json"]
        words += ["-H", f"Authorization: Bearer {key}"] * bool(key)
        words += ["-d", json.dumps(body)] * (body is not None)
        try:
            return json.loads(self.box.run(*words, check=False).stdout)
        except ValueError:
            return None

    def open(self) -> None:
        """Start the sandbox and connect the shop's account; the service runs."""
        self.start_sandbox()
        self.admin_key = self.command("key", "create", "--name", "admin", "--admin")
        body = {
            "instagram_account_id": SHOP,
            "access_token": TOKEN,
            "crm_webhook_url": f"{SANDBOX}/crm/webhook",
            "webhook_secret": WEBHOOK_SECRET,
        }
        made = self.ask("POST", f"{URL}/api/v1/accounts", body, self.admin_key)
        assert "account_id" in made, made
        self.account_id = made["account_id"]
        self.key = self.command("key", "create", "--name", "crm", "--account", self.account_id)

    def start_sandbox(self) -> None:
        """Start Instagram and the CRM; both have forgotten everything."""
        self.close()
        words = [*self.box.entering(), "crmbridge", "sandbox", "--callback-url", f"{URL}/webhooks/instagram"]
        path = {"PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        self.sandbox = subprocess.Popen(words, stdout=subprocess.DEVNULL, env=path)
        until(lambda: self.ask("GET", f"{SANDBOX}/sandbox/state"))

    def command(self, *words: str) -> str:
        """Run a command of the command line as the service's user, and return what it printed, without stderr."""
        line = " ".join(["crmbridge", *words, "2>/dev/null"])
        return self.box.run("su", "-s", "/bin/sh", "-c", line, "crmbridge").stdout.strip()

    def customer_says(self, text: str, customer: str = CUSTOMER) -> int:
        """Have the customer write; return how the bridge answered Instagram, 0 for not at all."""
        said = self.ask("POST", f"{SANDBOX}/sandbox/customers/{customer}/messages", {"text": text})
        return int(said["status"])

    def send(self, text: str) -> Any:
        """Send as the CRM does; the text is the idempotency key."""
        body = {"account_id": self.account_id, "recipient_id": CUSTOMER, "message": text, "idempotency_key": text}
        return self.ask("POST", f"{URL}/api/v1/messages/send", body, self.key)

    def at_crm(self) -> list[str]:
        """Return the texts of customers that the CRM took."""
        fresh = [one["event"] for one in self.crm_received() if one["answered"] == 200]
        return [one["message"] for one in fresh if one.get("event") == "message.received"]

    def crm_received(self) -> list[Any]:
        """Return every delivery that came to the CRM, and how it was answered."""
        received: list[Any] = self.ask("GET", f"{SANDBOX}/crm/sandbox/received")["received"]
        return received

    def at_instagram(self) -> list[str]:
        """Return the texts that Instagram took."""
        return [one["message"]["text"] for one in self.ask("GET", f"{SANDBOX}/sandbox/state")["sent"]]

    def crm_answers(self, **script: Any) -> None:
        self.ask("POST", f"{SANDBOX}/crm/sandbox/answers", script)

    def health(self) -> str:
        """Return the status in /health, or that nothing answers."""
        answer = self.ask("GET", f"{URL}/health")
        return answer["status"] if answer else "no answer"

    def wait_healthy(self) -> None:
        until(self.health, lambda said: said == "healthy")

    def wait_replaced(self, pid: int) -> None:
        until(self.pids, lambda pids: pids not in ([], [pid]))

    def wait_calling(self) -> None:
        """Wait until a call is in flight."""
        asked = "SELECT COUNT(*) FROM deliveries WHERE claim_id IS NOT NULL"
        until(lambda: self.box.run("sqlite3", "-readonly", f"{DATA}/bridge.db", asked).stdout.strip() != "0")

    def wait_live(self) -> None:
        until(lambda: self.ask("GET", f"{URL}/health/live"))

    def pids(self, words: str = "crmbridge serve") -> list[int]:
        """Return the processes that run these words, by their number inside."""
        return [int(pid) for pid in self.box.run("pgrep", "-f", f"^/opt/.* -m {words}", check=False).stdout.split()]

    def supervisors(self) -> list[str]:
        """Return the words of the supervisors that run."""
        found = self.box.run("ps", "-C", "supervise-daemo", "-o", "args=", check=False).stdout
        return found.splitlines()

    def pid(self, words: str = "crmbridge serve") -> int:
        (pid,) = self.pids(words)
        return pid

    def log(self) -> str:
        return (self.box.root / LOG.lstrip("/")).read_text()

    def close(self) -> None:
        if self.sandbox is not None:
            self.sandbox.kill()
            self.sandbox.wait()


@contextmanager
def opened(
    folder: Path, layer: Layer, *, memory_mb: int, conf_d: Sequence[str] = (), small_disk: bool = False, **settings: str
) -> Iterator[Shop]:
    """Yield a shop whose service was started by the boot, with its account connected.

    `settings` are those of `Shop.configure`. With `small_disk`, data and log lie on 64 MB and 1 MB.
    """
    box = Box(folder / "box", memory_mb=memory_mb, layer=layer)
    shop = Shop(box)
    try:
        shop.configure(**settings)
        shop.conf_d(*conf_d)
        for place, size in ((DATA, "64m"), (LOG.rpartition("/")[0], "1m")) if small_disk else ():
            box.run("sh", "-ec", f"""cp -a {place} /tmp/kept; mount -t tmpfs -o size={size} tmpfs {place}
                chown crmbridge: {place}; chmod 750 {place}; cp -a /tmp/kept/. {place}; rm -r /tmp/kept""")  # fmt: skip
        box.boot()
        shop.wait_healthy()
        shop.open()
        yield shop
    finally:
        shop.close()
        box.close()
