"""What a message costs in SQL, counted and not timed: statements from the webhook, or the POST, to the last 2xx.

Of the rooms and the engine, BEGIN and COMMIT aside; ``python -m bench moves`` counts a whole server's.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import counting
from crmbridge.health import Limits
from tests import rig as rigs
from tests.rig import Rig
from tests.waiting import until

EIGHT, MANY = 8, 80
# At most so many statements a message. What is to be reached: 14, 9 and 24.
MOST = {"lone": 14, "in turns of eight": 8.5, "send": 24}


@pytest.fixture
def counts() -> Iterator[counting.Counts]:
    found = counting.Counts()
    end = counting.count_sql(found, "bridge.db")
    yield found
    end()


@pytest.fixture
def busy(counts: counting.Counts, tmp_path: Path) -> Iterator[Rig]:
    """A shop with known customers, from 0 to 79; eight calls go out at a time."""
    with rigs.opened(tmp_path) as rig:
        rig.engine.stop(0)
        limits = Limits(slots=EIGHT, for_first_tries=1, probe_s=(5.0,), per_s={})
        rig.engine = rig.make_engine(limits, senders=2 * EIGHT)
        rig.account()
        hear(rig, *range(MANY))
        rig.call("GET", "/api/v1/accounts")
        rig.name_customers()
        rig.drain()
        rig.crm.received.clear()
        yield rig


def customer(number: int) -> str:
    return f"90{number:06}"


def hear(rig: Rig, *numbers: int) -> None:
    """Have Meta post a text of each of these customers in one webhook."""
    rig.now_s += 1
    messages = {number: {"mid": f"mid-{rig.now_s}-{number}", "text": "hello"} for number in numbers}
    rig.post_webhook(*(rig.item({"message": told}, contact=customer(number)) for number, told in messages.items()))


def send(rig: Rig, account_id: str, number: int) -> None:
    """Post a send to a customer."""
    rig.now_s += 1
    body = {"account_id": account_id, "recipient_id": customer(number), "message": "hello"}
    status, answer = rig.call("POST", "/api/v1/messages/send", {**body, "idempotency_key": f"key {rig.now_s}"})
    assert status == 202, answer


def a_message(counts: counting.Counts, number: int = 1) -> float:
    """Return how many statements a message took; shown when a test fails."""
    print(*counting.table(counts.statements, number), f"{counts.frames}", sep="\n")
    return counts.statements.total() / number


def test_a_lone_text_from_the_webhook_to_the_crm(busy: Rig, counts: counting.Counts) -> None:
    counts.clear()
    hear(busy, 7)
    busy.drain()
    assert busy.events() == ["message.received"]
    assert a_message(counts) <= MOST["lone"]
    assert counts.frames["COMMIT"] <= 3


def test_texts_in_turns_of_eight(busy: Rig, counts: counting.Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    call, ended = busy.rooms.crm.call, list[float]()

    def noted(*given: Any, **named: Any) -> Any:
        answer = call(*given, **named)
        ended.append(time.monotonic())
        return answer

    def eight_came_back() -> None:
        until(lambda: len(ended) % EIGHT == 0 and time.monotonic() > ended[-1] + 0.1)

    counts.clear()
    with monkeypatch.context() as patched:
        patched.setattr(busy.rooms.crm, "call", noted)
        patched.setattr("threading.Condition.wait", counting.late(eight_came_back))
        hear(busy, *range(MANY))
        busy.drain()
    assert busy.events() == ["message.received"] * MANY
    assert counts.frames["COMMIT"] == 2 + MANY // EIGHT  # one to keep them, and one more turn than there are eights
    assert a_message(counts, MANY) <= MOST["in turns of eight"]


def test_a_send_from_the_post_to_its_status_event(busy: Rig, counts: counting.Counts) -> None:
    account_id = busy.account_id
    send(busy, account_id, 6)
    busy.drain()
    counts.clear()
    send(busy, account_id, 7)
    busy.drain()
    assert busy.events() == ["message.sent"] * 2
    assert a_message(counts) <= MOST["send"]


def test_no_statement_on_the_way_of_a_message_is_compiled_anew(busy: Rig, counts: counting.Counts) -> None:
    """SQLite does so at each run where a bound parameter stands beside a partial index that names the value."""
    account_id = busy.account_id

    def talk(*numbers: int) -> None:
        for number in numbers:
            hear(busy, number)
            send(busy, account_id, number)
            busy.drain()
        hear(busy, *range(EIGHT))
        hear(busy, *range(EIGHT))
        busy.drain()

    talk(1, 2)
    counts.clear()
    talk(1, 3)
    assert counts.statements.total() > 200
    assert dict(counts.compiled) == {}


def test_a_lone_text_costs_the_same_among_two_accounts_and_among_two_hundred(
    busy: Rig, counts: counting.Counts
) -> None:
    """A turn that is told of one account looks at no other."""
    account_id, took = busy.account_id, []
    for others in (range(1), range(1, 199)):
        for number in others:
            busy.account(str(17841400000001000 + number))
        busy.drain()
        counts.clear()
        hear(busy, 7)
        busy.engine.tell({account_id})
        busy.engine.drain()
        took.append(a_message(counts))
    assert busy.events() == ["message.received"] * 2
    assert took[0] == took[1] <= MOST["lone"]
