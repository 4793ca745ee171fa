"""Which URLs of a CRM are taken: what can never be reached is refused at once, and what is taken is reached."""

import contextlib
import ipaddress
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from crmbridge import config, net
from crmbridge.errors import Invalid
from tests import apart
from tests import shop as shops
from tests.apart import apart as in_a_network_of_its_own
from tests.shop import SHOP_ID, Shop
from tests.test_reach import everywhere, point

_GOOD = """
crm.example xn--mller-kva.example müller.example MÜLLER.example straße.example my_crm.example _crm._tcp.example
crm.example. CRM.Example a-b.example a-.example b.-b.example a--b.example xn--.example
1crm.example 123.example 127.0.0.1.example 0x7f.example crm
93.184.216.34 [2600::1] [2600:0:0::1] [64:ff9b::93.184.216.34] [::ffff:93.184.216.34] localhost.example notlocalhost
"""
GOOD = [*_GOOD.split(), "a" * 63 + ".example", ".".join(["a" * 61] * 4) + ".bbbbb"]
_NUMBERS = """
2130706433 0x7f.1 0177.0.0.1 127.1 127.0.1 0x7f000001 017700000001 127.0.0.01 127.0.0.256 1.2.3.4.5 1.2.3
93.184.216.34. crm.example.1 crm.example.0x7f crm.1. 0x 08 a.0X7F
"""
_BRACKETS = """
[v1.x] [vF.a:b] [crm.example] [] [::1 ::1] [::1]x x[::1] [1.2.3.4] [::1%25lo] [::1%lo] [fe80::1%eth0] [:::]
[1:2:3:4:5:6:7] [1::2::3] [12345::] [[::1]]
"""
_ENCODED = """
%00 %00.example crm%2eexample crm.exam%70le %E4.example 127.0.0.1%00.example 127。0。0。1 １２７.0.0.1 ⑫.example
a。example ü_.example ü..example --ü--.example
"""
_CHARACTERS = """
-a.example - .crm.example crm..example .. . crm.example.. *.example * crm!.example crm,example crm;x (crm) ~crm a=b
a+b 'a' $a {a} a|b a^b a`b <a> crm.example\\x \\crm.example crm\\@evil.example
"""
_PORTS = """
crm.example:0 crm.example:65536 crm.example:99999 crm.example:100000 crm.example:-1 crm.example:+1 crm.example:http
crm.example:8080x crm.example:80:80 :8080 crm.example:٤٤٣ 127.0.0.1:0x50
"""
BAD = [
    *_NUMBERS.split(), *_BRACKETS.split(), *_ENCODED.split(), *_CHARACTERS.split(), *_PORTS.split(), "", " ",
    "crm .example", "a" * 64 + ".example", ".".join(["a" * 61] * 4) + ".bbbbbb", "ü" * 60 + ".example",
    ".".join(["ü"] * 40), "crm.example\t", "crm\n.example", "\x00", "crm\x7f.example", "crm\x85.example",
    "crm\u200b.example", "crm\u00a0.example",
]  # fmt: skip
_LOCAL = """
localhost localhost. LOCALHOST a.localhost a.b.localhost. 127.0.0.1 [::1] [::ffff:127.0.0.1] [::ffff:7f00:1] 10.0.0.1
[fd00::1] [64:ff9b::10.0.0.1] 0.0.0.0 [::] [64:ff9b:1::93.184.216.34] [2002:5db8:d822::] 169.254.169.254 [fe80::1]
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """A shop that allows no network of its own."""
    with shops.opened(tmp_path_factory.mktemp("reach")) as shop:
        shop.bridge.stop()
        shop.bridge.environ |= {"CRMBRIDGE_CRM_ALLOW_NETWORKS": ""}
        shop.start()
        yield shop


def put(shop: Shop, url: str) -> tuple[int, str, str]:
    answer = shop.call("PUT", f"/api/v1/accounts/{shop.account_id}", {"crm_webhook_url": url})
    told = answer.json()
    return answer.status_code, told.get("error", ""), (told.get("details") or [{}])[0].get("field", "")


@pytest.mark.parametrize("host", GOOD, ids=ascii)
def test_a_host_that_can_be_is_taken(shop: Shop, host: str) -> None:
    for port in ("", ":", ":8443", ":65535"):
        assert put(shop, f"https://{host}{port}/hook?a=b%20c") == (200, "", "")


@pytest.mark.parametrize("host", BAD, ids=ascii)
def test_a_host_that_can_never_work_is_refused(shop: Shop, host: str) -> None:
    status, error, field = put(shop, f"https://{host}/hook")
    assert (status, field) == (400, "crm_webhook_url")
    # What is no URL by its form alone is an invalid request.
    assert error == ("invalid_request" if any(one <= " " or one == "\x7f" for one in host) else "url_refused")
    if not any(one in host for one in "@#?/\\"):
        with pytest.raises(Invalid):
            net.Reach(any_address=True, http=True).check_url(f"http://{host}/", "crm_webhook_url")


@pytest.mark.parametrize("host", _LOCAL.split())
def test_what_leads_here_or_into_a_private_network_is_refused_unless_allowed(shop: Shop, host: str) -> None:
    assert put(shop, f"https://{host}:8443/hook") == (400, "url_refused", "crm_webhook_url")
    everything = config._networks("0.0.0.0/0 ::/0")
    net.Reach(networks=everything).check_url(f"https://{host}:8443/hook", "crm_webhook_url")


@pytest.mark.parametrize(
    "url",
    [
        "ftp://crm.example/", "https:/crm.example", "https:crm.example", "//crm.example/", "crm.example",
        "javascript:1", "https://a@crm.example/", "https://a:b@crm.example/", "https://@crm.example/", "https://crm.example/#part",
        "https://crm.example/a b", "https://crm.example/\x00", "https://crm.example/\n", " https://crm.example/",
    ],
)  # fmt: skip
def test_what_is_no_url_of_a_crm_is_refused(shop: Shop, url: str) -> None:
    assert put(shop, url)[0] == 400


@in_a_network_of_its_own
def test_what_is_taken_is_reached(tmp_path: Path) -> None:
    """An event arrives at each good host, by a real look-up of its name."""
    for host in GOOD:
        known = urlsplit(requests.Request("GET", f"http://{host}").prepare().url or "").hostname or ""
        apart.NAMES[known.rstrip(".")] = ["93.184.216.34"]
    with shops.opened(tmp_path, shops.QUICK) as shop, everywhere() as far:
        for number, host in enumerate(GOOD):
            point(shop, f"http://{host}:{far.port}/{number}")
            shop.meta.customer_says(SHOP_ID, f"71{number}", f"hello {number}")
            assert far.wait(number + 1)[-1].path == f"/{number}", host
            assert far.requests[-1].event["message"] == f"hello {number}"


_HOSTS = st.text(st.characters(codec="utf-8"), max_size=20) | st.from_regex(
    r"[a-z0-9.:\[\]%_@/\\-]{1,12}", fullmatch=True
)


@given(_HOSTS)
def test_what_is_judged_is_what_is_called(host: str) -> None:
    """The host of a URL that is taken is, for the HTTP client, the one that was judged."""
    url, reach = f"https://{host}/", net.Reach()
    try:
        reach.check_url(url, "crm_webhook_url")
    except Invalid:
        return
    session = net.Session(reach, connect_timeout_s=1, timeout_s=1)
    called = session._pools.connection_from_url(requests.Request("POST", url).prepare().url or "").host
    with contextlib.suppress(ValueError):
        assert reach.allows(str(ipaddress.ip_address(called)))
    assert called.encode("idna").decode() == called
