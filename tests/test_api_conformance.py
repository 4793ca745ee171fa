"""A running server answers as api-spec.yaml says: requests of all kinds from Schemathesis, and what a CRM received."""

from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.core.parameters import ParameterLocation

from crmbridge import config, signing
from crmbridge.sandbox.crm import WEBHOOK_SECRET
from crmbridge.sandbox.meta import APP_SECRET, VERIFY_TOKEN
from crmbridge.store import bodies, messages
from tests import shop as shops
from tests.shop import CUSTOMER, OTHER_ID, OTHER_TOKEN, TOKEN, Shop

pytestmark = pytest.mark.contract

EXAMPLES = 30
load_all_checks()
ALWAYS = CHECKS.get_by_names(
    [
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
        "response_headers_conformance",
        "unsupported_method",
        "allow_header_conformance",
        "missing_required_header",
        "ignored_auth",
        "negative_data_rejection",
        "positive_data_acceptance",
    ]
)
# Left out: use_after_free, ensure_resource_availability and object_level_authorization look at chains of requests,
# which this API's own tests script; max_response_time measures the machine.
[positive_data_acceptance] = CHECKS.get_by_names(["positive_data_acceptance"])
[negative_data_rejection] = CHECKS.get_by_names(["negative_data_rejection"])

api = schemathesis.openapi.from_path(
    config.ROOT / "api-spec.yaml",
    config=schemathesis.Config.from_dict(
        {
            "seed": 1,
            "suppress-health-check": ["all"],
            "generation": {"max-examples": EXAMPLES, "deterministic": True, "database": "none"},
        }
    ),
)


@api.parametrize()
def test_any_request_gets_a_documented_answer(case: Any, shop: Shop) -> None:
    excluded = []
    if case.operation.label == "POST /api/v1/accounts":
        # A token of the right form is seldom one that Instagram takes, and a URL may lead where it must not.
        excluded = [positive_data_acceptance]
    if case.operation.label == "POST /api/v1/messages/send":
        excluded = [positive_data_acceptance]  # no schema tells Instagram's limits
    case.call_and_validate(
        shop.url,
        headers={"Authorization": f"Bearer {shop.admin_key}"},
        checks=ALWAYS,
        excluded_checks=excluded,
        allow_redirects=False,
    )


@api.parametrize()
def test_requests_that_name_what_exists_get_a_documented_answer(case: Any, shop: Shop, message_id: str) -> None:
    """The same requests, with ids, tokens and signatures that are good wherever they were valid in form."""
    excluded, auth = [], None
    if valid(case, ParameterLocation.PATH) and "account_id" in case.path_parameters:
        case.path_parameters["account_id"] = shop.account_id if case.method != "DELETE" else spare_account(shop)
    if valid(case, ParameterLocation.PATH) and "message_id" in case.path_parameters:
        case.path_parameters["message_id"] = message_id
    if valid(case, ParameterLocation.QUERY) and "hub.verify_token" in case.query:
        case.query["hub.verify_token"] = VERIFY_TOKEN
    if valid(case, ParameterLocation.HEADER) and "X-Hub-Signature-256" in (case.headers or {}):
        auth = Signature()
        # Whatever Meta signs is taken and kept, also what is neither object nor array.
        excluded = [negative_data_rejection]
    if valid(case, ParameterLocation.BODY) and isinstance(case.body, dict):
        substitute(case.operation.label, case.body, shop)
    case.call_and_validate(
        shop.url,
        headers={"Authorization": f"Bearer {shop.admin_key}"},
        checks=ALWAYS,
        excluded_checks=excluded,
        allow_redirects=False,
        auth=auth,
    )


class Signature(requests.auth.AuthBase):
    """Signs a request as Meta does, over the bytes that go out."""

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        body = request.body or b""
        raw = body.encode() if isinstance(body, str) else body
        request.headers["X-Hub-Signature-256"] = signing.hub_signature(APP_SECRET, raw)
        return request


def valid(case: Any, location: ParameterLocation) -> bool:
    """Tell whether this part of a request is there and was meant to be valid."""
    component = case.meta.components.get(location)
    return component is not None and component.mode.is_positive


def substitute(operation: str, body: dict[str, Any], shop: Shop) -> None:
    """Put in what no schema can tell: ids and tokens that exist, a URL that is allowed, few enough bytes."""
    if operation == "POST /api/v1/messages/send":
        body["account_id"] = shop.account_id
        sendable(body)
    elif operation == "POST /api/v1/accounts":
        body |= {"instagram_account_id": OTHER_ID, "access_token": OTHER_TOKEN, "webhook_secret": WEBHOOK_SECRET}
    elif operation == "PUT /api/v1/accounts/{account_id}":
        body["webhook_secret"] = body.get("webhook_secret") or WEBHOOK_SECRET
        if "access_token" in body:
            body["access_token"] = TOKEN
    elif operation == "POST /api/v1/accounts/{account_id}/pause" and body.get("until"):
        body["until"] = "2099-01-01T00:00:00Z"
    if body.get("crm_webhook_url"):
        body["crm_webhook_url"] = shop.sandbox.crm_webhook_url


def sendable(body: dict[str, Any]) -> None:
    """Put in what no schema can tell of a send: Instagram's limits, a time to come, and a message that is there."""
    for name in ("send_before", "reply_to", "comment_id"):
        body.pop(name, None)
    body["recipient_id"] = body.get("recipient_id") or CUSTOMER
    forms = {name: body.pop(name, None) for name in ("message", "attachments", "template", "reaction", "action")}
    form = next((name for name, value in forms.items() if value), "message")
    body[form] = forms[form]
    if form != "message":
        body.pop("quick_replies", None)
    url = "https://cdn.example/lamp"
    match form:
        case "message":
            body["message"] = (body["message"] or "Hello.")[:250].strip() or "Hello."
            if body.get("quick_replies"):
                body["quick_replies"] = body["quick_replies"][:13]
        case "attachments":
            body["attachments"] = [{"type": "image", "url": url}] * min(len(body["attachments"]), 10)
        case "template":
            body["template"] = {"template_type": "generic", "elements": [{"title": "Lamp", "image_url": url}]}
        case "reaction":
            body["action"] = "mark_seen"
            del body["reaction"]


def spare_account(shop: Shop) -> str:
    """Return an account that may be deleted."""
    shop.connect(instagram_account_id=OTHER_ID, access_token=OTHER_TOKEN)
    found = shop.call("GET", "/api/v1/accounts", key=shop.admin_key).json()["accounts"]
    [spare] = [account["account_id"] for account in found if account["instagram_account_id"] == OTHER_ID]
    return str(spare)


@pytest.fixture(scope="module")
def message_id(shop: Shop) -> str:
    return str(shop.send("hello", "conformance").json()["message_id"])


# --- what a CRM receives ---


def test_a_round_trip_brings_every_event(tmp_path: Path) -> None:
    switches = "comments = true\nmentions = true\n"
    with shops.opened(tmp_path, shops.QUICK, instagram=switches) as shop:
        meta, crm = shop.meta, shop.crm
        for number, path in enumerate(sorted((Path(__file__).parent / "payloads").glob("*.json"))):
            own = path.read_bytes().replace(b'"aWdf', b'"aWdf%02d' % number)  # each about messages of its own
            assert meta.post(own).status == 200, path
        crm.wait(1, where=lambda one: one.event["event"] == "message.received")
        meta.auto_read = True
        assert shop.send("Good day!", "one", metadata={"ticket": 4711, "nested": {"a": [None, 1.5]}}).status_code == 202
        crm.wait(1, where=lambda one: one.event["event"] == "message.read")
        refusal = {"message": "outside of allowed window", "code": 10, "error_subcode": 2534022}
        meta.fault("/messages", status=400, body={"error": refusal})
        assert shop.send("Too late", "two").status_code == 202
        crm.wait(1, where=lambda one: one.event["event"] == "message.failed")
        wanted = shop.rows("SELECT COUNT(*) FROM deliveries WHERE target = 'crm' AND account_id = ?", shop.account_id)
        received = crm.wait(wanted[0][0])
    assert {one.event["event"] for one in received} == {*bodies.TOLD, *messages.TOLD}
    assert all(one.verified for one in received)
