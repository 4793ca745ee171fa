"""Posts a signed event to a CRM and maps its answer to done, retry or refused."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from crmbridge import __version__, config, net, signing
from crmbridge.errors import Refused, Retry
from crmbridge.events import instant, new_id

_USER_AGENT = f"crmbridge/{__version__}"


@dataclass(frozen=True)
class Posted:
    """A CRM's acceptance."""

    http_status: int


def reach(given: config.Crm) -> net.Reach:
    """Return where CRM URLs may lead."""
    return net.Reach(networks=given.allow_networks, http=given.allow_http)


def open_session(given: config.Crm, *, connections: int) -> net.Session:
    """Return a session for calls to CRMs. Raises Misconfigured when `ca_file` cannot be used."""
    return net.Session(
        reach(given),
        connect_timeout_s=given.connect_timeout_s,
        timeout_s=given.timeout_s,
        connections=connections,
        status_decides=True,
        tls=net.trust(given.ca_file) if given.ca_file else None,
    )


def post(
    session: net.Session,
    *,
    url: str,
    secrets: Sequence[str],
    event_id: str,
    body: bytes,
    correlation_id: str,
    now_s: float,
) -> Posted:
    """Deliver one event: 2xx is done, 401 is final, 410 waits, both hold the endpoint; all else is tried again.

    Raises Refused or Retry. The signatures cover the exact bytes of `body`; X-Hub-Signature-256 is made with the first
    of the `secrets`, webhook-signature with all that are Standard Webhooks secrets.
    """
    headers = {
        "Content-Type": "application/json",
        "User-Agent": _USER_AGENT,
        "webhook-id": event_id,
        "X-Correlation-Id": correlation_id,
    }
    if secrets:
        headers["X-Hub-Signature-256"] = signing.hub_signature(secrets[0], body)
    keys = [key for secret in secrets if (key := signing.standard_key(secret)) is not None]
    if keys:
        headers["webhook-timestamp"] = str(int(now_s))
        headers["webhook-signature"] = signing.standard_signature(keys, event_id, int(now_s), body)
    try:
        answer = session.call("POST", url, headers=headers, body=body)
    except net.CallFailed as failure:
        raise Retry(failure.message, code=failure.code) from None
    if 200 <= answer.status < 300:
        return Posted(answer.status)
    if answer.status == 401:
        raise Refused(
            "the CRM answered 401: it does not accept our signature",
            code="crm_unauthorized",
            http_status=401,
            stops="crm_unauthorized",
        )
    if answer.status == 410:
        raise Retry(
            "the CRM answered 410: nothing is taken at this URL any more",
            code="crm_gone",
            http_status=410,
            counts=False,
            stops="crm_gone",
        )
    code = "rate_limited" if answer.status == 429 else "crm_redirect" if 300 <= answer.status < 400 else "crm_error"
    hint = ", and no redirect is followed: name the address it leads to" if code == "crm_redirect" else ""
    raise Retry(
        f"the CRM answered {answer.status}{hint}",
        code=code,
        http_status=answer.status,
        after_s=retry_after_s(answer.headers.get("Retry-After"), now_s),
    )


def test(session: net.Session, *, url: str, secrets: Sequence[str], account_id: str, now_s: float) -> Posted:
    """Send a signed ``webhook.test``, of which nothing is stored. Raises Refused or Retry as `post` does."""
    event_id = new_id("evt")
    event = {
        "event": "webhook.test",
        "event_id": event_id,
        "sequence": None,
        "account_id": account_id,
        "timestamp": instant(now_s),
        "test": True,
    }
    body = json.dumps(event, separators=(",", ":")).encode()
    correlation_id = new_id("req")
    return post(
        session, url=url, secrets=secrets, event_id=event_id, body=body, correlation_id=correlation_id, now_s=now_s
    )


def retry_after_s(value: str | None, now_s: float) -> float | None:
    """Read a Retry-After header: seconds, or an HTTP date; None when there is none that can be read."""
    if not value:
        return None
    value = value.strip()
    if value.isascii() and value.isdigit() and len(value) < 10:
        return float(value)
    try:
        return max(parsedate_to_datetime(value).timestamp() - now_s, 0.0)
    except (ValueError, TypeError, OverflowError):
        return None
