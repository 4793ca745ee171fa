"""Every answer that a test sees and every body that the sandbox's CRM receives is held to api-spec.yaml.

`attach` looks over the shoulder of requests and of the sample CRM; a test that reads a socket by itself calls
`hold_answer`. What does not fit is collected, as much of it comes in threads, and fails the test that runs by then.
"""

import functools
import json
import re
from typing import Any
from urllib.parse import urlsplit

import bottle
import jsonschema
import pytest
import requests
import yaml

from crmbridge import config
from crmbridge.sandbox.crm import SampleCrm

METHODS = ("get", "put", "post", "delete", "patch", "head", "options", "trace")
_loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_found: list[str] = []


@functools.cache
def load() -> dict[str, Any]:
    """Return the file, as it is."""
    found: dict[str, Any] = yaml.load((config.ROOT / "api-spec.yaml").read_bytes(), _loader)
    return found


def prose() -> str:
    """Return what the file tells at length: its description and those of its tags."""
    return "\n".join([load()["info"]["description"], *(tag["description"] for tag in load()["tags"])])


def resolve(node: dict[str, Any]) -> dict[str, Any]:
    """Follow a reference inside the file; what stands beside it goes before what it leads to."""
    while "$ref" in node:
        found: Any = load()
        for step in node["$ref"].removeprefix("#/").split("/"):
            found = found[step]
        node = {**found, **{key: value for key, value in node.items() if key != "$ref"}}
    return node


def problems() -> list[str]:
    """Return what did not fit since this was asked last."""
    found = _found[:]
    _found.clear()
    return found


def attach(patch: pytest.MonkeyPatch) -> None:
    """Hold what requests brings from the bridge, and what its CRM gets, to the file."""
    send, receive = requests.Session.send, SampleCrm._receive

    def sent(session: requests.Session, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        answer = send(session, request, **options)
        if "X-Correlation-Id" in answer.headers and not options.get("stream"):  # so the bridge alone answers
            kind = answer.headers.get("Content-Type", "")
            hold_answer(request.method or "", request.url or "", answer.status_code, kind, answer.content)
        return answer

    def received(crm: SampleCrm, **path: str) -> Any:
        request = bottle.request
        if request.get_header("webhook-id"):  # so the bridge alone posts
            hold_event(request.body.read(), dict(request.headers.items()))
        return receive(crm, **path)

    patch.setattr(requests.Session, "send", sent)
    patch.setattr(SampleCrm, "_receive", received)


def hold_answer(method: str, url: str, status: int, kind: str, body: bytes) -> None:
    """Hold an answer of the bridge to what its operation says, and what belongs to none to the form of errors."""
    path = urlsplit(url).path
    operation = _operation("GET" if method == "HEAD" else method, path)
    schemas: dict[str, Any]
    if operation is None:
        schemas = {"application/json": {"$ref": "#/components/schemas/ErrorAnswer"}} if status >= 400 else {}
    elif str(status) in operation["responses"]:
        answer = resolve(operation["responses"][str(status)])
        schemas = {name: content["schema"] for name, content in answer.get("content", {}).items()}
    else:
        _found.append(f"{method} {path}: no status {status}: {body[:300]!r}")
        return
    named = kind.partition(";")[0]
    if method == "HEAD" or not (body or schemas):
        return
    if named not in schemas:
        _found.append(f"{method} {path} {status}: no {named or 'content'}: {body[:300]!r}")
    elif named == "application/json":
        _found.extend(f"{method} {path} {status}: {told}" for told in misfits(schemas[named], json.loads(body)))


def hold_found(path: str, found: dict[str, Any]) -> None:
    """Hold what a route finds, and a test reads without calling it."""
    hold_answer("GET", path, 200, "application/json", json.dumps(found).encode())


def hold_event(body: bytes, headers: dict[str, str]) -> None:
    """Hold what a CRM received to what the webhook of that event says."""
    event = json.loads(body)
    operation = load()["webhooks"].get(event.get("event"), {}).get("post")
    if operation is None:
        _found.append(f"a CRM received an event without a description: {body[:300]!r}")
        return
    name = event["event"]
    content = operation["requestBody"]["content"]["application/json"]
    _found.extend(f"{name}: {told}" for told in misfits(content["schema"], event))
    came = {header.lower(): value for header, value in headers.items()}
    for header in map(resolve, operation["parameters"]):
        value = came.get(header["name"].lower())
        if value is not None:
            _found.extend(f"{name}: {header['name']}: {told}" for told in misfits(header["schema"], value))
        elif header.get("required"):
            _found.append(f"{name}: no header {header['name']}")
    if came["webhook-id"] != event["event_id"]:
        _found.append(f"{name}: webhook-id is not the event_id")


def misfits(schema: dict[str, Any], value: Any) -> list[str]:
    """Return what does not fit a schema of the file; a field that it does not describe does not fit either."""
    errors = _validator(json.dumps(schema)).iter_errors(value)
    found = [jsonschema.exceptions.best_match([error]) or error for error in errors]
    return [f"{error.json_path}: {error.message[:300]}" for error in found]


def _operation(method: str, path: str) -> Any:
    for pattern, template in _templates():
        if pattern.fullmatch(path):
            operation = load()["paths"][template].get(method.lower())
            if operation is not None:
                return operation
    return None


@functools.cache
def _templates() -> list[tuple[re.Pattern[str], str]]:
    # A path without a variable goes first. A slash at the end is overlooked, as by the application. What is to be
    # explained may be named by a CRM's own word, with slashes in it.
    ordered = sorted(load()["paths"], key=lambda path: "{" in path)
    free = {path: ".+" if "explain" in path else "[^/]+" for path in ordered}
    return [(re.compile(re.sub(r"{\w+}", free[path], path) + "/?"), path) for path in ordered]


@functools.cache
def _validator(schema: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator({**_closed(json.loads(schema)), "components": _components()})


@functools.cache
def _components() -> dict[str, Any]:
    """Return the schemas as this version keeps them; an event that it does not know is nothing it may tell."""
    return {"schemas": {**_closed(load()["components"]["schemas"]), "OtherEvent": False}}


def _closed(node: Any) -> Any:
    """Close what is open to later versions: fields, words, and the form of times. Requests are closed as they stand."""
    if isinstance(node, list):
        return [_closed(inner) for inner in node]
    if not isinstance(node, dict) or node.get("additionalProperties") is False:
        return node
    found = {key: _closed(inner) for key, inner in node.items()}
    if isinstance(node.get("properties"), dict) and isinstance(node.get("type"), str):
        found.setdefault("additionalProperties", False)
    if "x-extensible-enum" in node:
        found["enum"] = [*node["x-extensible-enum"], None]  # `type` tells whether null may be
    if node.get("format") == "date-time":
        found["pattern"] = r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$"
    return found
