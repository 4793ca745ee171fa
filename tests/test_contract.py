"""api-spec.yaml is sound, and says of requests, routes, errors and schedules what the code does.

That answers and events are as it says is held to by `tests.spec` in every test that sees one.
"""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import openapi_spec_validator
import pytest
from pydantic.json_schema import models_json_schema

import crmbridge
from crmbridge import apikey, bridge, config, contract, errors
from crmbridge.delivery import FLOORS_S
from crmbridge.instagram import codes
from crmbridge.sandbox.crm import WEBHOOK_SECRET
from crmbridge.store import bodies, messages
from crmbridge.store.deliveries import Patience
from crmbridge.web import app as web_app
from tests import spec
from tests.rig import Rig
from tests.spec import METHODS, resolve

SPEC = spec.load()
ABOUT = spec.prose()
SCHEMAS: dict[str, Any] = SPEC["components"]["schemas"]
REQUESTS: dict[str, type[contract._Request]] = {
    name: model
    for name, model in vars(contract).items()
    if inspect.isclass(model) and issubclass(model, contract._Request) and model is not contract._Request
}
# What stands in the spec for people, or says nothing. A default, which generators take for a field that must be sent,
# stands in the description.
NOISE = {"title", "description", "example", "examples", "default"}


def operations() -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (method.upper(), path): operation
        for path, item in SPEC["paths"].items()
        for method, operation in item.items()
        if method in METHODS
    }


def events() -> dict[str, dict[str, Any]]:
    return {event: item["post"] for event, item in SPEC["webhooks"].items()}


def routes() -> dict[tuple[str, str], web_app.Route]:
    """Return the routes of the application as the command line wires it, without a database."""
    nothing: Any = None
    rooms = bridge.Rooms(config.Settings(), nothing, nothing, nothing, nothing, nothing, nothing, Patience(1, 1))
    app = bridge.make_app(rooms, lambda _: None)
    return {(route.method, re.sub(r"<(\w+)(:[^>]*)?>", r"{\1}", route.path)): route for route in app.routes}


def errors_of(operation: dict[str, Any]) -> dict[int, dict[str, Any]]:
    answers = {int(status): resolve(answer) for status, answer in operation["responses"].items()}
    return {status: answer for status, answer in answers.items() if status >= 400}


def shown(content: dict[str, Any]) -> list[Any]:
    """Return the examples of a body; where it has none of its own, its schema's."""
    if "example" in content:
        return [content["example"]]
    if "examples" in content:
        return [example["value"] for example in content["examples"].values()]
    found: list[Any] = resolve(content["schema"])["examples"]
    return found


def error_table() -> dict[int, set[str]]:
    """Return the slugs of the table under "Errors", by status."""
    found: dict[int, set[str]] = {}
    for status, slugs in re.findall(r"^\| (\d{3}) \| ([^|]*) \|", ABOUT, re.MULTILINE):
        found.setdefault(int(status), set()).update(re.findall(r"`([a-z_]+)`", slugs))
    return found


def code_table() -> set[str]:
    """Return the codes of the tables of failed messages and of Instagram's refusals."""
    rows = re.findall(r"^\| (`[a-z_`, ]+`) \|", ABOUT, re.MULTILINE)
    return {code for row in rows for code in re.findall(r"`([a-z_]+)`", row)}


OPERATIONS, EVENTS, ROUTES = operations(), events(), routes()
TOLD = {*bodies.TOLD, *messages.TOLD, "webhook.test"}


# --- the file ---


def test_the_spec_is_valid_openapi() -> None:
    openapi_spec_validator.validate(SPEC)
    assert SPEC["openapi"] == "3.1.0"
    assert SPEC["servers"] == [{"url": "/"}]


def test_every_part_that_is_defined_is_used() -> None:
    text = json.dumps(SPEC)
    for kind, parts in SPEC["components"].items():
        for name in parts:
            # 405 answers any path and belongs to no operation.
            used = f'"#/components/{kind}/{name}"' in text or name == "MethodNotAllowed"
            assert used or kind == "securitySchemes", f"{kind}/{name} is used nowhere"


def test_every_operation_says_what_it_is() -> None:
    everything = [*OPERATIONS.values(), *EVENTS.values()]
    for operation in everything:
        name = operation["operationId"]
        assert [other["operationId"] for other in everything].count(name) == 1
        assert operation["summary"], name
        assert len(operation["description"]) > 40, name
        assert set(operation["tags"]) <= {tag["name"] for tag in SPEC["tags"]}, name


# --- schemas and requests ---


def plain(schema: Any) -> Any:
    """Reduce a JSON schema to what it demands, however it is written."""
    if isinstance(schema, bool):
        return schema
    found = {key: value for key, value in schema.items() if key not in NOISE}
    if "$ref" in found:
        found["$ref"] = found["$ref"].rsplit("/", 1)[-1]
    options = found.get("anyOf", [])
    if len(options) == 2 and options[1] == {"type": "null"} and "$ref" not in options[0]:
        merged = {**plain(options[0]), **{key: value for key, value in found.items() if key != "anyOf"}}
        merged["type"] = sorted([*merged["type"], "null"])
        if "enum" in merged:
            merged["enum"] = [*merged["enum"], None]
        found = merged
    for key, value in found.items():
        if key in ("properties", "$defs"):
            found[key] = {name: plain(inner) for name, inner in value.items()}
        elif key in ("items", "additionalProperties"):
            found[key] = plain(value)
        elif key in ("anyOf", "oneOf", "allOf"):
            found[key] = [plain(inner) for inner in value]
        elif key == "type":
            found[key] = [value] if isinstance(value, str) else sorted(value)
        elif key in ("enum", "required"):
            found[key] = sorted(value, key=str)
    return found


def test_every_request_is_described_as_it_is_read() -> None:
    _, generated = models_json_schema([(model, "validation") for model in REQUESTS.values()])
    for name, model in REQUESTS.items():
        expected = plain(generated["$defs"][name])
        if model.one_of:
            expected["allOf"] = [{"oneOf": [given(field) for field in fields]} for fields in model.one_of]
        # What one field demands of another is held by the tests of its operation.
        assert {**plain(SCHEMAS[name]), "not": None} == {**expected, "not": None}, name


def given(field: str) -> dict[str, Any]:
    return {"required": [field], "properties": {field: {"not": {"type": "null"}}}}


@pytest.mark.parametrize(("url", "secret", "fits"), [("set", "set", True), ("set", None, False), (None, None, True)])
def test_an_update_takes_no_url_without_a_secret(rig: Rig, url: str | None, secret: str | None, fits: bool) -> None:
    body = {"crm_webhook_url": url and rig.sandbox.crm_webhook_url, "webhook_secret": secret and WEBHOOK_SECRET}
    assert (spec.misfits(SCHEMAS["AccountUpdate"], body) == []) == fits
    path = f"/api/v1/accounts/{rig.account()['id']}"
    assert rig.call("PUT", path, body)[0] == (200 if fits else 400)


def test_requests_are_strict_and_answers_are_open() -> None:
    """So that a client that is generated from the file goes on when something is added."""
    for name, schema in SCHEMAS.items():
        written = json.dumps(schema)
        if name in REQUESTS:
            assert schema["additionalProperties"] is False, name
            assert '"default"' not in written, name
            continue
        assert '"additionalProperties": false' not in written, name
        closed = {field for field, inner in schema.get("properties", {}).items() if {"enum", "const"} & set(inner)}
        assert closed <= {"event", "test"}, name  # by which an event is told
        assert written.count('"enum"') + written.count('"const"') == len(closed), name


def test_every_event_is_known_or_another() -> None:
    listed = SCHEMAS["EventPage"]["properties"]["events"]["items"]["anyOf"]
    assert [entry["$ref"].rsplit("/", 1)[-1] for entry in listed] == ["KnownEvent", "OtherEvent"]
    known = {json.dumps(entry) for entry in SCHEMAS["KnownEvent"]["anyOf"]}
    bodies = [operation["requestBody"]["content"]["application/json"] for operation in EVENTS.values()]
    pushed = {json.dumps(body["schema"]) for body in bodies}
    assert pushed - known == {'{"$ref": "#/components/schemas/WebhookTest"}'}
    assert known <= pushed


def test_every_schema_and_field_is_described() -> None:
    for name, schema in SCHEMAS.items():
        assert schema["description"], name
        for field, inner in schema.get("properties", {}).items():
            # A reference has its own description; a single word needs none.
            assert {"description", "$ref", "const", "x-extensible-enum"} & set(inner), f"{name}.{field}"


# --- operations and routes ---


def test_every_route_has_its_operation_and_every_operation_its_route() -> None:
    assert set(OPERATIONS) == set(ROUTES)


def test_an_operation_takes_what_its_route_takes() -> None:
    for name, route in ROUTES.items():
        method, path = name
        operation = OPERATIONS[name]
        parameters = map(resolve, [*SPEC["paths"][path]["parameters"], *operation.get("parameters", [])])
        places = {(entry["in"], entry["name"]) for entry in parameters}
        assert {entry for place, entry in places if place == "path"} == set(re.findall(r"{(\w+)}", path)), name
        if route.query is not None:
            assert {entry for place, entry in places if place == "query"} == route.query, name
        assert ("header", "X-Request-Id") in places, name
        assert ("requestBody" in operation) == (method in ("POST", "PUT")), name


def test_an_operation_names_its_permission_and_the_answers_that_follow() -> None:
    for name, route in ROUTES.items():
        operation, expected = OPERATIONS[name], {400, 500, 503}
        stated = re.search(r"\*\*Permission:\*\* `?([a-z:]+)`?\.", operation["description"])
        assert (stated[1] if stated else None) == route.permission, name
        if route.permission is None:
            assert operation["security"] == [], name
        else:
            assert "security" not in operation, name
            expected |= {401, 403}
        if "requestBody" in operation:
            expected |= {413} if route.permission is None else {413, 415}
        if "{" in name[1]:
            expected |= {404}
        assert expected <= set(errors_of(operation)), name


def test_every_answer_has_its_headers_and_errors_their_form() -> None:
    for name, operation in OPERATIONS.items():
        for status, answer in operation["responses"].items():
            answer, place = resolve(answer), (*name, status)
            assert "X-Correlation-Id" in answer["headers"], place
            assert ("WWW-Authenticate" in answer["headers"]) == (status == "401"), place
            assert ("Retry-After" in answer["headers"]) == (status in ("429", "503")), place
            assert ("Location" in answer["headers"]) == (status in ("201", "302")), place
            if status >= "400":
                assert "ErrorAnswer" in json.dumps(answer["content"]["application/json"]["schema"]), place


def test_permissions_are_documented() -> None:
    rows = set(re.findall(r"^\| `([a-z]+:[a-z]+)` \|", ABOUT, re.MULTILINE))
    assert rows == set(apikey.PERMISSIONS)


# --- answers and events ---

ALIVE = {"status": "alive", "timestamp": "2026-02-03T10:15:30.512Z"}


@pytest.mark.parametrize(
    ("path", "status", "kind", "body"),
    [
        pytest.param("/health/live", 200, "application/json", {**ALIVE, "mood": "good"}, id="one field more"),
        pytest.param("/health/live", 200, "application/json", {"status": "alive"}, id="one field less"),
        pytest.param("/health/live", 200, "application/json", {**ALIVE, "timestamp": "now"}, id="another form"),
        pytest.param("/health/live", 200, "application/json", {**ALIVE, "status": "asleep"}, id="another word"),
        pytest.param("/health/live", 200, "application/json", {**ALIVE, "status": None}, id="null"),
        pytest.param("/health/live", 200, "text/plain", ALIVE, id="another type"),
        pytest.param("/health/live", 202, "application/json", ALIVE, id="another status"),
        pytest.param("/nothing", 404, "application/json", ALIVE, id="no error"),
        pytest.param("/nothing", 200, "application/json", ALIVE, id="another path"),
    ],
)
def test_an_answer_that_is_not_as_described_is_found(path: str, status: int, kind: str, body: Any) -> None:
    spec.hold_answer("GET", "http://bridge/health/live/?a=b", 200, "application/json", json.dumps(ALIVE).encode())
    assert spec.problems() == []
    spec.hold_answer("GET", path, status, kind, json.dumps(body).encode())
    assert spec.problems()


@pytest.mark.parametrize(
    "change", [{"mood": "good"}, {"sequence": "1"}, {"event": "message.lost"}, {"attachments": [{}]}]
)
def test_an_event_that_is_not_as_described_is_found(change: dict[str, Any]) -> None:
    [event] = shown(EVENTS["message.received"]["requestBody"]["content"]["application/json"])
    headers = {"webhook-id": event["event_id"], "X-Hub-Signature-256": "sha256=" + "0" * 64, "X-Correlation-Id": "req"}
    spec.hold_event(json.dumps(event).encode(), headers)
    assert spec.problems() == []
    spec.hold_event(json.dumps({**event, **change}).encode(), headers)
    assert spec.problems()
    del headers["X-Correlation-Id"]
    spec.hold_event(json.dumps(event).encode(), headers)
    assert spec.problems() == ["message.received: no header X-Correlation-Id"]


def test_a_page_with_an_event_that_is_not_described_is_found() -> None:
    [page] = shown(OPERATIONS["GET", "/api/v1/events"]["responses"]["200"]["content"]["application/json"])
    spec.hold_found("/api/v1/events", page)
    assert spec.problems() == []
    spec.hold_found("/api/v1/events", {**page, "events": [{**page["events"][0], "event": "message.lost"}]})
    assert spec.problems()


# --- errors ---

WRONG: list[Any] = [
    None, True, 7, 7.5, "", " ", "nonsense", "a\nb", "ü b", "http://", "https://x y/", "x" * 5000, [], {}, [7] * 3,
    ["deliveries"] * 3, [{}], [{"a": 1}], {"a": 1}, {"type": "x", "template_type": 7, "action": "x", "message_id": "x"},
    {"template_type": "generic", "elements": [{"title": 7, "image_url": "x", "buttons": []}]},
    {"template_type": "button", "buttons": [{"type": "call", "title": " ", "url": "x", "payload": "x" * 1001}]},
]  # fmt: skip


@pytest.mark.parametrize("model", REQUESTS.values(), ids=REQUESTS)
def test_a_wrong_input_is_told_in_the_words_of_the_api(model: Any) -> None:
    bodies: list[Any] = [{}, [], 7, None, "text", {"mesage": 1}]
    bodies += [{name: value} for name in model.model_fields for value in WRONG]
    refused = []
    for body in bodies:
        try:
            contract.read(model, json.dumps(body).encode())
        except errors.Invalid as error:
            refused.append(error)
    assert len(refused) > len(model.model_fields)
    for caught in refused:
        for detail in caught.details:
            said = detail["problem"]
            assert re.match(
                r"(must (be|have|hold|begin|not be) |is required$|is not a field of |exactly one of )", said
            )
            assert not re.search(r"[A-Z_]\w* should|\bshould\b|[Ii]nput|\bstring\b|[{}]|specification|\(s\)", said)
        for detail in caught.details[:3]:
            assert f"{detail['field']} {detail['problem']}".replace("(body)", "The body") in caught.message


def test_many_problems_are_told_in_one_sentence() -> None:
    with pytest.raises(errors.Invalid) as caught:
        contract.read(contract.AccountCreate, b'{"a": 1, "b": 2, "instagram_account_id": "?", "username": ""}')
    assert caught.value.message == (
        "instagram_account_id must be an id of Instagram's: 1 to 128 letters, digits and any of _ . : -; "
        "username must not be empty; access_token is required; and 2 more in details."
    )
    with pytest.raises(errors.Invalid) as caught:
        contract.read(contract.AccountCreate, b"[]")
    assert caught.value.message == "The body must be an object."


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"a": 1,\n "b" 2}', "The body is not valid JSON: look at line 2, character 6."),
        (b'{"a": 1', "The body is not valid JSON: look at line 1, character 7."),
        (b'{"metadata": "\\ud800"}', "The body is not valid JSON: look at line 1, character 21."),
        (b"[" * 100_000, "The body is nested too deeply."),
        (b'{"a": "\xff"}', "The body is not UTF-8 (byte 7 is 0xff); send JSON as UTF-8."),
    ],
)
def test_what_is_no_json_is_told_by_its_place(body: bytes, said: str) -> None:
    with pytest.raises(errors.Invalid) as caught:
        contract.read(contract.SendRequest, body)
    assert (caught.value.code, caught.value.message) == ("malformed_json", said)


def test_every_error_class_has_a_documented_status() -> None:
    table, status_of = error_table(), dict(web_app._STATUS)
    classes = {cls for cls in vars(errors).values() if inspect.isclass(cls) and issubclass(cls, errors.BridgeError)}
    inside = {cls for cls in classes if issubclass(cls, errors.AttemptFailed)} | {errors.Misconfigured}
    for cls in classes - inside - {errors.BridgeError}:
        assert cls.code in table[status_of[cls]], cls.__name__
    assert not inside & set(status_of)


def test_every_slug_that_the_code_raises_is_documented() -> None:
    documented = set().union(*error_table().values()) | code_table()
    rooms = [path for path in Path(crmbridge.__file__).parent.rglob("*.py") if "sandbox" not in path.parts]
    for path in rooms:
        if path.name == "crm.py":  # what CRMs answer is told to the administrator, not to CRMs
            continue
        raised = re.findall(r'(?:\bcode=|CallFailed\(\s*)"([a-z_]+)"', path.read_text())
        assert set(raised) <= documented, path.name


def test_every_meaning_of_metas_codes_is_documented() -> None:
    others = {"in_doubt", "account_deleted", "system_fault", "abandoned"}
    assert {meaning.slug for meaning in codes._TABLE.values()} | others <= code_table()


def test_errors_name_documented_slugs() -> None:
    table = error_table()
    slugs = set().union(*table.values())
    for name, operation in OPERATIONS.items():
        for status, answer in errors_of(operation).items():
            named = set(re.findall(r"`([a-z_]+)`", answer["description"])) & slugs
            assert named, (name, status)
            assert named <= table[status], (name, status)


def test_the_documented_schedules_are_the_defaults() -> None:
    delivery, crm = config.Delivery(), config.Crm()
    quick, slow = [f"{delay:g}" for delay in delivery.crm_quick_s], [f"{delay / 60:g}" for delay in delivery.crm_slow_s]
    counted = [f"{delay:g}" for delay in delivery.instagram_retry_s]
    waits = [f"{delay:g}" for delay in delivery.instagram_unavailable_s]
    for told in (ABOUT, SPEC["components"]["responses"]["EventRepeated"]["description"]):
        told = " ".join(told.split())
        assert f"after {', '.join(quick[:-1])} and {quick[-1]} s" in told
        assert f"after {', '.join(slow[:-2])} and {slow[-2]} minutes" in told
        assert f"{crm.timeout_s:g} s" in told
    assert slow[-1] == "60"
    assert f"after {', '.join(counted[:-1])} and {counted[-1]} s" in ABOUT
    assert f"after {', '.join(waits[:-1])} s and then every {waits[-1]} s" in ABOUT
    floors = FLOORS_S["rate_limited"], FLOORS_S["rate_uneven"]
    assert (
        "`rate_limited` waits at least {:g} s, and `rate_uneven` (Meta's 613/1996) at least {:g} s".format(*floors)
        in ABOUT
    )
    assert delivery.crm_give_up_s == delivery.instagram_give_up_s == 24 * 3600


# --- examples ---


def test_every_body_has_examples_and_they_conform() -> None:
    bodies = [("405", SPEC["components"]["responses"]["MethodNotAllowed"])]
    for operation in [*OPERATIONS.values(), *EVENTS.values()]:
        parts = [("request", operation.get("requestBody", {})), *operation["responses"].items()]
        bodies += [(f"{operation['operationId']} {part}", resolve(node)) for part, node in parts]
    for place, body in bodies:
        for kind, content in body.get("content", {}).items():
            if kind != "image/png":
                examples = shown(content)
                assert examples, place
                assert [spec.misfits(content["schema"], example) for example in examples] == [[]] * len(examples), place


def test_parameters_and_headers_have_examples_that_conform() -> None:
    """An optional parameter may go without: Swagger UI would send its example with every try."""
    nodes = [resolve(entry) for item in SPEC["paths"].values() for entry in item["parameters"]]
    for operation in [*OPERATIONS.values(), *EVENTS.values()]:
        nodes += [resolve(entry) for entry in operation.get("parameters", [])]
    nodes += SPEC["components"]["headers"].values()
    for node in nodes:
        assert "example" in node or not node.get("required"), node
        if "example" in node:
            assert spec.misfits(node["schema"], node["example"]) == [], node


# --- what CRMs receive ---


def test_every_crm_event_is_a_webhook_and_every_webhook_an_event() -> None:
    assert set(EVENTS) == TOLD


def test_a_webhook_has_its_headers_and_answers() -> None:
    for event, operation in EVENTS.items():
        content = operation["requestBody"]["content"]["application/json"]
        assert all(example["event"] == event for example in shown(content)), event
        assert operation["security"] == [], event
        headers = {entry["name"]: entry.get("required", False) for entry in map(resolve, operation["parameters"])}
        assert headers == {
            "webhook-id": True,
            "X-Hub-Signature-256": True,
            "X-Correlation-Id": True,
            "webhook-timestamp": False,
            "webhook-signature": False,
        }, event
        assert set(operation["responses"]) == {"2XX", "401", "default"}, event
