"""What Meta posts when an owner removes the app or asks for deletion: ``<signature>.<payload>``, both base64url.

Source: "Data Deletion Request Callback" and "Parsing the signed request".
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from crmbridge import signing
from crmbridge.errors import Invalid, Unauthorized

_CODE_LETTERS = 20


@dataclass(frozen=True)
class Request:
    """Who it is about, as Meta calls the account for this app, and a code that is the same for every repetition."""

    user_id: str
    code: str


def read(text: str, app_secrets: Sequence[str]) -> Request:
    """Return what was asked. Raises Unauthorized unless an app secret signed it, Invalid when it makes no sense."""
    if not text:
        raise Unauthorized("The form field signed_request is missing.", code="signature_missing")
    given, _, payload = text.partition(".")
    signature = _decoded(given)
    # What is signed is the second part as it is written; the digest is that of the webhooks, in other letters.
    written = f"sha256={(signature or b'').hex()}"
    if signature is None or not signing.hub_signature_matches(app_secrets, written, payload.encode()):
        raise Unauthorized("signed_request was made with none of the app secrets.", code="signature_mismatch")
    try:
        found = json.loads(_decoded(payload) or b"")
    except (ValueError, RecursionError):
        found = None
    user_id = found.get("user_id") if isinstance(found, dict) else None
    if not isinstance(user_id, str | int) or not str(user_id).isascii() or not str(user_id):
        raise Invalid("signed_request names no user_id.")
    code = base64.b32encode(hashlib.sha256(signature).digest()).decode().lower()[:_CODE_LETTERS]
    return Request(str(user_id), code)


def _decoded(text: str) -> bytes | None:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return None
