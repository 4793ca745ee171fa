"""Reads the URLs that people configure, and refuses what can never be reached. Resolves no name, opens no socket.

Needs the standard library alone, as ``crmbridge health`` loads next to nothing.
"""

import contextlib
import ipaddress
import re
from typing import NamedTuple
from urllib.parse import SplitResult, urlsplit

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_PLACE = re.compile(r"(?:\[([^\[\]]*)\]|([^\[\]:]*))(?::([0-9]{0,5}))?")
_LABEL = re.compile(r"[a-z0-9_-]{1,63}|[a-z0-9_-]*[^\x00-\x7f]\S*")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


class Place(NamedTuple):
    """Where a URL leads: `address` is set when the host is one, not a name."""

    parts: SplitResult
    host: str
    address: Address | None


def read(url: str) -> Place:
    """Read an http or https URL. Raises ValueError with a problem that does not repeat the URL: it may be a secret."""
    if not url.isprintable() or " " in url or "\\" in url:  # WHATWG takes a backslash for a slash
        raise ValueError("must have no blanks, control characters or backslashes")
    try:
        parts = urlsplit(url)
        found = _PLACE.fullmatch(parts.netloc.rpartition("@")[2])
    except ValueError:
        found = None
    if found is None:
        raise ValueError("is not a URL")
    literal, name, port = found.groups()
    if parts.scheme not in ("http", "https") or not (literal or name):
        raise ValueError("must be an http:// or https:// URL with a host")
    if port and not 0 < int(port) < 65_536:
        raise ValueError("has a port that is not between 1 and 65535")
    host = (literal or name).lower()
    return Place(parts, host, _v6(host) if literal else _v4_or_name(host))


def is_localhost(host: str) -> bool:
    """Tell whether a name means this machine (RFC 6761, section 6.3)."""
    return f".{host.removesuffix('.')}".endswith(".localhost")


def _v6(host: str) -> Address:
    with contextlib.suppress(ValueError):
        if "%" not in host:
            return ipaddress.IPv6Address(host)
    raise ValueError("has a host in brackets that is not an IPv6 address")


def _v4_or_name(host: str) -> Address | None:
    labels = host.removesuffix(".").split(".")
    if _NUMBER.fullmatch(labels[-1]):
        # What ends in a number is read as an address in one way here and in another one there.
        with contextlib.suppress(ValueError):
            return ipaddress.IPv4Address(host)
        raise ValueError("has a host that ends in a number but is not a dotted IPv4 address")
    # The C library looks up no name that begins with a hyphen.
    if (
        host.startswith("-")
        or len(host.removesuffix(".")) > 253
        or not all(_LABEL.fullmatch(label) for label in labels)
    ):
        raise ValueError("has a host that is not a name that can be looked up")
    return None
