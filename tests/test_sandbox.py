"""The sandbox behaves as Meta and a CRM do on the wire; every later test rests on that."""

import hashlib
import hmac
import json
import threading
import time
from pathlib import Path

import bottle
import pytest
import requests

from crmbridge import signing
from crmbridge.sandbox import LoopbackServer, SampleCrm, Sandbox, shapes, wire
from tests import shop as shops
from tests.waiting import PATIENCE_S

ACCOUNT, TOKEN, IGSID = "17841400000000001", "IGAAtoken", "900000000000001"


class Bridge:
    """What stands where the bridge would: takes webhooks and keeps them."""

    def __init__(self):
        self.taken, self.refuse, self.arrived = [], 0, threading.Condition()
        app = bottle.Bottle()
        app.route("/hook", "POST", self.take)
        app.route("/hook", "GET", lambda: bottle.request.query["hub.challenge"])
        app.route("/api/v1/messages/send", "POST", lambda: bottle.HTTPResponse({"got": bottle.request.json}, 202))
        self.server = LoopbackServer(app)

    def take(self):
        with self.arrived:
            self.taken.append((bottle.request.body.read(), dict(bottle.request.headers)))
            self.arrived.notify_all()
            self.refuse -= 1
            return bottle.HTTPResponse(status=503 if self.refuse >= 0 else 200)

    def items(self):
        return [json.loads(body)["entry"][0]["messaging"][0] for body, _ in self.taken]


@pytest.fixture
def bridge():
    bridge = Bridge()
    with bridge.server:
        yield bridge


@pytest.fixture
def sandbox(bridge):
    with Sandbox(callback_url=f"{bridge.server.url}/hook") as sandbox:
        sandbox.meta.add_account(ACCOUNT, token=TOKEN, app_scoped_id="25000000000000001", username="shop")
        yield sandbox


def graph(sandbox, method, path, body=None, token=TOKEN):
    headers = {"Authorization": f"Bearer {token}"}
    return requests.request(method, f"{sandbox.graph_url}/{path}", json=body, headers=headers, timeout=PATIENCE_S)


def send(sandbox, text="hello", **more):
    return graph(sandbox, "POST", "me/messages", {"recipient": {"id": IGSID}, "message": {"text": text}, **more})


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "example.org", ""])
def test_only_loopback_is_bound(host):
    with pytest.raises(ValueError, match="loopback"):
        LoopbackServer(bottle.Bottle(), host)


def test_another_origins_page_is_refused(sandbox):
    for headers in ({"Origin": "https://example.org"}, {"Host": "example.org"}):
        assert requests.get(f"{sandbox.url}/sandbox/state", headers=headers, timeout=PATIENCE_S).status_code == 403
    assert "</html>" in requests.get(sandbox.url, timeout=PATIENCE_S).text


def test_a_mid_carries_account_thread_and_time():
    mids = [wire.mint_mid(ACCOUNT, igsid, 1_770_000_000_123) for igsid in (IGSID, IGSID, "9")]
    (account, thread, at_ms), second, other = map(wire.read_mid, mids)
    assert (account, at_ms) == (ACCOUNT, 1_770_000_000_123)
    assert thread == second[1] != other[1]
    assert len(set(mids)) == 3
    assert all(mid.isalnum() and mid.startswith("aWdfZAG1faXRlbTox") and 155 <= len(mid) <= 170 for mid in mids)


def test_a_mid_from_production_is_read():
    captured = (
        "aWdfZAG1faXRlbToxOklHTWVzc2FnZAUlEOjE3ODQxNDYyNDYwMzY1NDc1OjM0MDI4MjM2Njg0MTcxMDMwMTI0NDI1OTM4NDQz"
        "MzA2NDE5OTI0NTozMTQ5MzU0MzM1NzkyOTAyNzUxODIzNjIzMjU4MjY5Mjg2NAZDZD"
    )
    assert wire.read_mid(captured) == (
        "17841462460365475",
        "340282366841710301244259384433064199245",
        1_707_268_406_396,
    )


def test_webhooks_are_escaped_and_signed_over_the_bytes(sandbox, bridge):
    posted = sandbox.meta.customer_says(ACCOUNT, IGSID, "café https://a.b 😀")
    assert posted.status == 200
    body, headers = bridge.taken[0]
    assert rb"caf\u00e9 https:\/\/a.b \ud83d\ude00" in body
    assert signing.hub_signature_matches([sandbox.meta.app_secret], headers["X-Hub-Signature-256"], body)
    sha1 = hmac.new(sandbox.meta.app_secret.encode(), body, hashlib.sha1).hexdigest()
    assert headers["X-Hub-Signature"] == f"sha1={sha1}"
    item = bridge.items()[0]
    assert (item["sender"], item["message"]["mid"]) == ({"id": IGSID}, posted.mid)


@pytest.mark.parametrize(("how", "kept"), [("missing", []), ("sha1_only", ["X-Hub-Signature"])])
def test_signatures_can_be_left_out(sandbox, bridge, how, kept):
    sandbox.meta.post({"object": "instagram", "entry": []}, signature=how)
    assert [name for name in bridge.taken[0][1] if "Signature" in name] == kept


def test_a_signature_can_be_wrong(sandbox, bridge):
    sandbox.meta.post(b"[]", signature="bad")
    body, headers = bridge.taken[0]
    assert not signing.hub_signature_matches([sandbox.meta.app_secret], headers["X-Hub-Signature-256"], body)


def test_the_handshake_returns_the_challenge(sandbox):
    assert sandbox.meta.verify_handshake(challenge="1158201444").body == "1158201444"


def test_me_has_two_forms(sandbox):
    flat = {"user_id": ACCOUNT, "username": "shop", "id": "25000000000000001"}
    assert graph(sandbox, "GET", "me?fields=user_id,username").json() == flat
    sandbox.meta.me_form = "data"
    assert graph(sandbox, "GET", "me?fields=user_id,username").json() == {"data": [flat]}
    assert requests.get(f"{sandbox.url}/me?access_token={TOKEN}", timeout=PATIENCE_S).status_code == 200


def test_a_bad_token_is_190(sandbox):
    answer = graph(sandbox, "POST", "me/messages", {}, token="other")
    assert (answer.status_code, answer.json()["error"]["code"], answer.json()["error"]["type"]) == (
        (400, 190, "OAuthException")
    )


def test_subscription_profile_and_refresh(sandbox):
    path = f"{ACCOUNT}/subscribed_apps"
    assert graph(sandbox, "POST", f"{path}?subscribed_fields=messages,messaging_seen").json() == {"success": True}
    assert graph(sandbox, "GET", path).json()["data"][0]["subscribed_fields"] == ["messages", "messaging_seen"]
    assert graph(sandbox, "DELETE", path).json() == {"success": True}
    assert graph(sandbox, "GET", path).json() == {"data": []}
    assert graph(sandbox, "POST", path, {"subscribed_fields": ["nonsense"]}).json()["error"]["code"] == 100
    assert graph(sandbox, "GET", f"{IGSID}?fields=username").json()["error"]["code"] == 230
    sandbox.meta.add_customer(IGSID, username="customer")
    assert graph(sandbox, "GET", f"{IGSID}?fields=username").json()["username"] == "customer"
    query = {"grant_type": "ig_refresh_token", "access_token": TOKEN}
    fresh = requests.get(f"{sandbox.url}/refresh_access_token", query, timeout=PATIENCE_S).json()["access_token"]
    assert graph(sandbox, "GET", "me", token=fresh).ok


@pytest.mark.parametrize("echo", ["after", "before", "never"])
def test_a_send_is_recorded_and_echoed(sandbox, bridge, echo):
    sandbox.meta.configure(echo=echo, auto_read=True)
    mid = send(sandbox, "köstlich").json()["message_id"]
    if echo == "before":
        assert bridge.items()[0]["message"]["mid"] == mid
    sandbox.meta.flush()
    (sent,) = sandbox.meta.wait_sent(1)
    assert (sent.user_id, sent.recipient_id, sent.text, sent.mid) == (ACCOUNT, IGSID, "köstlich", mid)
    assert "Authorization" not in sent.headers
    assert sent.payload == json.loads(sent.body)
    *echoes, read = bridge.items()
    assert read["read"] == {"mid": mid}
    assert [one["message"] for one in echoes] == [{"mid": mid, "text": "köstlich", "is_echo": True}] * (echo != "never")


def test_echoes_are_repeated_in_order_until_taken(sandbox, bridge):
    bridge.refuse = 2
    mids = [send(sandbox).json()["message_id"] for _ in range(2)]
    sandbox.meta.flush()
    assert [one["message"]["mid"] for one in bridge.items()] == [mids[0], mids[0], mids[0], mids[1]]


@pytest.mark.parametrize(
    ("message", "code"),
    [({"text": "ü" * 501}, 100), ({}, 100), ({"text": "a", "attachment": {"type": "image"}}, 100), ("text", 100)],
)
def test_a_wrong_message_is_refused(sandbox, message, code):
    answer = graph(sandbox, "POST", "me/messages", {"recipient": {"id": IGSID}, "message": message})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
    assert sandbox.meta.sent == []


URL = "https://cdn.example/x"
TITLED = {"content_type": "text", "title": "a", "payload": "b"}


@pytest.mark.parametrize(
    "body",
    [
        {"message": {"text": "a", "quick_replies": [TITLED] * 14}},
        {"message": {"text": "a", "quick_replies": [{"title": "a", "payload": "b"}]}},
        {"message": {"attachment": {"type": "image"}}},
        {"message": {"attachment": {"type": "sticker", "payload": {"url": URL}}}},
        {"message": {"attachments": [{"type": "image", "payload": {"url": URL}}] * 11}},
        {"message": {"attachment": {"type": "template", "payload": {"template_type": "list"}}}},
        {"message": {"attachment": {"type": "template", "payload": {"template_type": "button", "text": "a"}}}},
        {"message": {"text": "a"}, "tag": "ACCOUNT_UPDATE"},
        {"sender_action": "react", "payload": {"message_id": "mid"}},
        {"sender_action": "typing_on", "message": {"text": "a"}},
    ],
)
def test_a_form_that_instagram_does_not_take_is_refused(sandbox, body):
    answer = graph(sandbox, "POST", "me/messages", {"recipient": {"id": IGSID}, **body})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, 100)


def test_a_body_may_be_a_form_with_json_in_it(sandbox):
    form = {"recipient": json.dumps({"id": IGSID}), "message": json.dumps({"text": "hi"}), "tag": "HUMAN_AGENT"}
    headers = {"Authorization": f"Bearer {TOKEN}"}
    answer = requests.post(f"{sandbox.graph_url}/me/messages", data=form, headers=headers, timeout=PATIENCE_S)
    (sent,) = sandbox.meta.sent
    assert answer.json() == {"recipient_id": IGSID, "message_id": sent.mid}
    assert (sent.text, sent.payload["tag"], sent.body[:10]) == ("hi", "HUMAN_AGENT", b"recipient=")


def test_windows_tags_and_comments_are_kept_to(sandbox, bridge):
    def code(**body):
        answer = graph(sandbox, "POST", "me/messages", {"recipient": {"id": IGSID}, "message": {"text": "a"}, **body})
        error = answer.json().get("error", {})
        return answer.status_code, error.get("code"), error.get("error_subcode")

    sandbox.meta.configure(window=True, human_agent=False, media="too_large")
    assert code() == (403, 10, 2534022)
    sandbox.meta.customer_says(ACCOUNT, IGSID, "hi", timestamp_ms=int((time.time() - 86_390) * 1000))
    assert code() == (200, None, None)
    sandbox.meta.clock = lambda: time.time() + 60
    assert code() == (403, 10, 2534022)
    assert code(tag="HUMAN_AGENT") == (403, 10, None)
    sandbox.meta.human_agent = True
    assert code(tag="HUMAN_AGENT") == (200, None, None)
    assert code(recipient={"comment_id": "1"}) == (200, None, None)
    assert code(recipient={"comment_id": "1"})[1] == 10900
    media = {"attachment": {"type": "file", "payload": {"url": URL}}}
    assert code(message=media, tag="HUMAN_AGENT") == (400, 100, 2018109)


@pytest.mark.parametrize(
    ("shape", "days"),
    [("reaction", 1), ("referral", 1), ("postback", 1), ("edit_zero", 1), ("ad_opened", 7), ("from_ad", 7)]
    + [(shape, 0) for shape in ("reaction_taken_back", "edit", "unsend", "optin", "handover", "comment", "mention")],
)
def test_a_window_lasts_as_long_as_the_act_that_opens_it(sandbox, shape, days):
    sandbox.meta.window = True
    path = f"{sandbox.url}/sandbox/customers/{IGSID}/shapes/{shape}"
    assert requests.post(path, json={"mid": "m1"}, timeout=10).status_code == 200
    for at_s, is_open in ((0, days > 0), (days * 86_400 - 60, days > 0), (days * 86_400 + 60, False)):
        sandbox.meta.clock = lambda at_s=at_s: time.time() + at_s
        assert send(sandbox).ok == is_open


def test_a_fault_replaces_the_answer_for_its_times(sandbox):
    sandbox.meta.fault("messages", times=2, status=400, body=wire.error_body(613), headers={"Retry-After": "7"})
    first, second, third = (send(sandbox) for _ in range(3))
    assert (first.status_code, second.json()["error"]["code"], first.headers["Retry-After"]) == (400, 613, "7")
    assert third.ok
    assert len(sandbox.meta.sent) == 1
    assert [(one.path, one.status) for one in sandbox.meta.calls][1:] == [
        ("/v27.0/me/messages", 400),
        ("/v27.0/me/messages", 200),
    ]


def test_a_fault_after_the_effect_hides_a_delivery(sandbox, bridge):
    sandbox.meta.fault("messages", status=502, body="<html>Bad gateway</html>", after_effect=True)
    answer = send(sandbox)
    sandbox.meta.flush()
    assert (answer.status_code, answer.headers["Content-Type"][:9]) == (502, "text/html")
    assert bridge.items()[0]["message"]["mid"] == sandbox.meta.sent[0].mid


@pytest.mark.parametrize("after_effect", [False, True])
def test_a_dropped_connection_has_no_answer(sandbox, after_effect):
    sandbox.meta.fault("messages", drop=True, after_effect=after_effect)
    with pytest.raises(requests.ConnectionError):
        send(sandbox)
    assert len(sandbox.meta.sent) == after_effect
    assert send(sandbox).ok


def crm_post(sandbox, body, secret, path=""):
    headers = {"X-Hub-Signature-256": signing.hub_signature(secret, body)}
    return requests.post(sandbox.crm_webhook_url + path, body, headers=headers, timeout=PATIENCE_S).status_code


def test_the_crm_verifies_and_records(sandbox):
    crm: SampleCrm = sandbox.crm
    assert crm_post(sandbox, b'{"event":"message.sent"}', crm.secret, "/acc2") == 200
    assert crm_post(sandbox, b'{"event":"message.sent"}', "wrong") == 401
    good, bad = crm.wait(2)
    assert (good.event, good.verified, good.path) == ({"event": "message.sent"}, True, "/webhook/acc2")
    assert (bad.verified, bad.answered) == (False, 401)
    with pytest.raises(TimeoutError, match="1 of 2"):
        crm.wait(2, timeout_s=0.01, where=lambda one: one.verified)


def test_the_crm_answers_by_script(sandbox):
    crm, body = sandbox.crm, b'{"event":"a"}'
    crm.answer(500, event="b")
    crm.answer(503, times=2)
    crm.answer_always(410)
    assert [crm_post(sandbox, body, crm.secret) for _ in range(3)] == [503, 503, 410]
    assert crm_post(sandbox, b'{"event":"b"}', crm.secret) == 500
    crm.answer_always(None)
    assert crm_post(sandbox, body, crm.secret) == 200
    assert [one.answered for one in crm.received] == [503, 503, 410, 500, 200]


def test_everything_can_be_done_over_http(sandbox, bridge):
    def control(method, path, body=None, status=200):
        answer = requests.request(method, f"{sandbox.url}{path}", json=body, timeout=PATIENCE_S)
        assert answer.status_code == status, answer.text
        return answer.json()

    said = control("POST", f"/sandbox/customers/{IGSID}/messages", {"text": "hi", "username": "customer"})
    assert (said["status"], bridge.items()[0]["message"]["mid"]) == (200, said["mid"])
    control("POST", f"/sandbox/customers/{IGSID}/reads", {"mid": said["mid"]})
    control("POST", "/sandbox/webhooks?signature=missing", {"entry": []})
    assert len(bridge.taken) == 3
    control("POST", "/sandbox/faults", {"path": "me", "status": 400})
    assert graph(sandbox, "GET", "me").status_code == 400
    assert control("PUT", "/sandbox/settings", {"echo": "never"})["echo"] == "never"
    control("POST", "/sandbox/accounts", {"user_id": "2", "token": "t2", "username": "other"})
    assert graph(sandbox, "GET", "me?fields=user_id", token="t2").json()["user_id"] == "2"
    state = control("GET", "/sandbox/state")
    assert [one["text"] for one in state["messages"]] == ["hi"]
    assert [one["username"] for one in state["accounts"]] == ["shop", "other"]
    for path, body in (("settings", {"echo": "x"}), ("settings", {"x": 1}), ("settings", [])):
        assert control("PUT", f"/sandbox/{path}", body, 400)["error"]
    assert control("POST", "/sandbox/faults", {"path": "me", "status": "x"}, 400)["error"]
    control("POST", "/sandbox/faults", {"path": "me", "error": "190/463", "status": 401})
    refused = graph(sandbox, "GET", "me")
    assert (refused.status_code, refused.json()["error"]["error_subcode"]) == (401, 463)
    assert control("POST", "/sandbox/faults", {"path": "me", "error": "x"}, 400)["error"]
    assert control("POST", "/sandbox/privacy", {"what": "x"}, 400)["error"]
    assert control("POST", "/sandbox/privacy", {"what": "deauthorize", "user_id": "2"})["status"] == 404
    assert graph(sandbox, "GET", "me", token="t2").json()["error"]["code"] == 190
    assert control("POST", "/sandbox/nothing", {}, 404)["error"]

    control("POST", "/crm/sandbox/answers", {"status": 503})
    assert crm_post(sandbox, b"{}", sandbox.crm.secret) == 503
    assert control("GET", "/crm/sandbox/received")["received"][0]["answered"] == 503
    assert control("POST", "/crm/sandbox/replies", {"recipient_id": IGSID, "text": "yes"}, 400)["error"]
    control("PUT", "/crm/sandbox/settings", {"bridge_url": bridge.server.url, "api_key": "k", "account_id": "acc_1"})
    reply = control("POST", "/crm/sandbox/replies", {"recipient_id": IGSID, "text": "yes"})
    assert (reply["http"], reply["answer"]["got"]["message"]) == (202, "yes")
    control("POST", "/sandbox/faults", {"path": "me", "status": 400, "times": 9})
    assert control("DELETE", "/sandbox/faults") == {"scripted": False}
    assert sandbox.meta._faults == []
    control("POST", "/sandbox/reset")
    control("POST", "/crm/sandbox/reset")
    assert control("GET", "/sandbox/state")["messages"] == control("GET", "/crm/sandbox/received")["received"] == []


def test_every_shape_can_be_said_by_name_and_is_told_as_what_it_is(tmp_path: Path) -> None:
    told = {
        **dict.fromkeys(("reaction", "reaction_taken_back"), "message.reaction"),
        **dict.fromkeys(("unsupported", "edit_zero", "optin", "handover"), "message.unsupported"),
        "edit": "message.edited",
        "unsend": "message.deleted",
        "postback": "message.postback",
        **dict.fromkeys(("referral", "ad_opened"), "message.referral"),
        "comment": "comment.received",
        "mention": "mention.received",
        "test": None,
        "empty_entry": None,
    }
    with shops.opened(tmp_path, shops.QUICK, instagram="comments = true\nmentions = true\n") as shop:
        base = shop.sandbox.url + "/sandbox"
        for number, name in enumerate(requests.get(base + "/shapes", timeout=PATIENCE_S).json()["shapes"]):
            first = shop.meta.customer_says(shops.SHOP_ID, f"90000000000{number:04}", "hello")
            shop.crm.wait(1)  # a new customer's first message may wait for their name
            about = {"mid": first.mid} if name in shapes._ABOUT else {}
            path = f"{base}/customers/90000000000{number:04}/shapes/{name}"
            answer = requests.post(path, json={**about, "times": 2}, timeout=PATIENCE_S)
            assert (answer.status_code, answer.json()["status"]) == (200, 200), name
            wanted = told.get(name, "message.received")
            events = shop.crm.wait(1 + (wanted is not None))
            assert [entry.event["event"] for entry in events][1:] == [wanted] * (wanted is not None), name
            shop.crm.reset()
        requests.post(f"{base}/customers/2/shapes/referral", json={}, timeout=PATIENCE_S)
        assert "2" not in shop.meta.customers
        requests.post(f"{base}/customers/2/shapes/postback", json={}, timeout=PATIENCE_S)
        assert "2" in shop.meta.customers  # who has written lets their names be read
        assert requests.post(f"{base}/customers/1/shapes/unsend", json={}, timeout=PATIENCE_S).status_code == 400
        assert requests.post(f"{base}/customers/1/shapes/nonsense", json={}, timeout=PATIENCE_S).status_code == 400


def test_media_are_fetched_well_or_not_as_the_address_says(sandbox):
    found = {
        state: requests.get(f"{sandbox.url}/cdn/{state}", timeout=PATIENCE_S)
        for state in ("ok", "mistyped", "gone", "expired", "slow?seconds=0.01", "nonsense")
    }
    assert [answer.status_code for answer in found.values()] == [200, 200, 404, 403, 200, 403]
    assert found["ok"].content == found["mistyped"].content == found["slow?seconds=0.01"].content
    assert [found[state].headers["Content-Type"] for state in ("ok", "mistyped")] == ["image/png", "text/html"]
    body = shapes.payload("image", ACCOUNT, IGSID, 1, url="http://127.0.0.1/cdn/gone")
    assert body["entry"][0]["messaging"][0]["message"]["attachments"][0]["payload"]["url"].endswith("/cdn/gone")
