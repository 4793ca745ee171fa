"""What is owed where nothing goes any more: a deleted account, a CRM without a URL. It ends in small steps."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from crmbridge.events import instant
from crmbridge.store import accounts, deliveries, messages, turn
from crmbridge.store.database import Row, Tx
from crmbridge.store.deliveries import Debt
from crmbridge.upkeep import Upkeep
from tests.rig import Rig
from tests.shop import OTHER_ID
from tests.test_feed import hundreds_of_steps

MANY = 700


def owe_much(rig: Rig, account: dict[str, Any], number: int = MANY) -> None:
    """Have events and sends wait, twenty to a lane, and as many dead events be asked for again."""
    now = instant(rig.now_s)

    def job(tx: Tx) -> None:
        for count in range(number):
            contact, name = f"c{count // 20}", f"{account['id']}{count}"
            event = Debt("crm", account["id"], contact, "message.received", "test", event_id=f"evt_{name}")
            deliveries.owe(tx, event)
            row = {"id": f"msg_{name}", "account_id": account["id"], "recipient_id": contact, "idempotency_key": name}
            tx.insert(
                "outbound_messages",
                {**row, "request_hash": "", "content": '{"text": "hi"}', "status": "pending", "correlation_id": "test",
                 "created_at": now},
            )  # fmt: skip
            send = Debt("instagram", account["id"], contact, "message.send", "test", message_id=row["id"])
            deliveries.owe(tx, send)
            dead = Debt("crm", account["id"], contact, "message.received", "test", event_id=f"evt_dead{name}")
            died = deliveries.owe(tx, dead)
            asked = {"place": "dead", "finished_at": now}
            tx.update("deliveries", asked, "id = ?", [died])

    rig.db.write(job)


def largest_write(rig: Rig, monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> int:
    """Return how many rows the largest write touched."""
    connection, commit = rig.db._db.connection(), rig.db._db.commit
    totals: list[int] = [connection.total_changes]

    def counted() -> None:
        commit()
        totals.append(connection.total_changes)

    with monkeypatch.context() as patch:
        patch.setattr(rig.db._db, "commit", counted)
        work()
    return max(later - earlier for earlier, later in itertools.pairwise(totals))


def states(rig: Rig, account: dict[str, Any]) -> list[tuple[str, str, str | None, int]]:
    found = rig.db.rows(
        """
        SELECT target, state, last_code, COUNT(*) AS number FROM deliveries WHERE account_id = ?
            GROUP BY 1, 2, 3 ORDER BY 1, 2, 3""",
        (account["id"],),
    )
    return [(row["target"], row["state"], row["last_code"], row["number"]) for row in found]


def sweep(rig: Rig) -> None:
    Upkeep(rig.db, rig.settings.retention, rig.patience, rig.alarm, clock=rig.clock, pause=lambda seconds: None).sweep()


ENDED = [
    ("crm", "dead", None, MANY),
    ("crm", "dead", "account_deleted", MANY),
    ("instagram", "dead", "account_deleted", MANY),
]


def test_a_deleted_account_ends_in_small_writes(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    account, other = rig.account(), rig.account(OTHER_ID)
    owe_much(rig, account)
    owe_much(rig, other, 3)
    assert largest_write(rig, monkeypatch, lambda: turn.delete_account(rig.db, account["id"])) <= 1000
    assert states(rig, account) == ENDED
    assert rig.db.rows("SELECT status, error_code, COUNT(*) AS number FROM outbound_messages GROUP BY 1, 2") == [
        {"status": "failed", "error_code": "account_deleted", "number": MANY},
        {"status": "pending", "error_code": None, "number": 3},
    ]
    owed = [("crm", "pending", None, 3), ("instagram", "pending", None, 3)]
    assert states(rig, other) == [("crm", "dead", None, 3), *owed]
    assert rig.db.value("SELECT COUNT(*) FROM history WHERE kind = 'dead' AND code = 'account_deleted'") == 2 * MANY
    message = messages.status(rig.db, f"msg_{account['id']}1")
    assert message
    assert [step["status"] for step in message["status_history"]] == ["pending", "failed"]


def test_a_deletion_that_was_broken_off_serves_nothing_and_goes_on(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    account = rig.account()
    owe_much(rig, account)

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rig.db, "write_last", die)
        with pytest.raises(KeyboardInterrupt):
            turn.delete_account(rig.db, account["id"])
    assert rig.db.row("SELECT deleted_at FROM accounts") == {"deleted_at": instant(rig.now_s)}
    assert rig.db.rows("SELECT * FROM endpoints") == []
    assert rig.drain() is None
    assert turn.expire(rig.db, rig.now_s + 90_000, rig.patience) == {}
    assert (rig.crm.received, rig.meta.sent) == ([], [])
    sweep(rig)
    assert states(rig, account) == ENDED


def test_without_a_url_what_waits_is_left_to_be_read_in_small_writes(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    account = rig.account()
    owe_much(rig, account)

    def stop() -> None:
        rig.change_account(account, url=None)
        sweep(rig)

    assert largest_write(rig, monkeypatch, stop) <= 1000
    assert states(rig, account) == [
        ("crm", "dead", None, MANY),
        ("crm", "done", "not_pushed", MANY),
        ("instagram", "pending", None, MANY),
    ]


def test_without_a_url_nothing_is_called_or_given_up_and_with_one_again_the_rest_goes_there(rig: Rig) -> None:
    account = rig.account()
    rig.say("one", "mid-1")
    rig.say("two", "mid-2")
    for url in (None, account["crm_webhook_url"]):
        assert rig.crm.received == []
        rig.change_account(account, url=url)
        if url is None:
            assert rig.drain() is None
            assert turn.expire(rig.db, rig.now_s + 90_000, rig.patience) == {}
    turn.end_leftovers(rig.db)
    rig.drain()
    assert [entry.event["message"] for entry in rig.taken()] == ["one", "two"]


def test_a_step_of_ending_costs_the_same_however_much_waits(rig: Rig) -> None:
    account = rig.account()
    owe_much(rig, account, 6000)
    rig.db.write(lambda tx: accounts.erase(tx, account["id"]))
    endpoints: list[Row] = []
    assert hundreds_of_steps(rig.db, lambda: endpoints.extend(deliveries.unserved(rig.db))) < 10
    assert [endpoint["target"] for endpoint in endpoints] == ["crm", "instagram"]
    assert hundreds_of_steps(rig.db, lambda: [deliveries.left_over(rig.db, one, 200) for one in endpoints]) < 100
