"""The configuration: what is shipped is complete, and a mistake is named with its place."""

import configparser
from dataclasses import fields, replace
from pathlib import Path

import pytest

from crmbridge import config
from crmbridge.errors import Misconfigured


@pytest.fixture
def ini(tmp_path: Path) -> Path:
    return tmp_path / "crmbridge.ini"


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_the_shipped_file_has_every_key_and_no_other() -> None:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(config.SHIPPED_INI, encoding="utf-8")
    shipped = {section: set(parser[section]) for section in parser.sections()}
    assert shipped == {section: {entry.name for entry in fields(cls)} for section, cls in config._SECTIONS.items()}


def test_a_byte_order_mark_before_the_first_section_is_none_of_it(ini: Path) -> None:
    assert config.load(written(ini, "\ufeff[web]\nport = 81\n"), {}).web.port == 81


def test_the_shipped_values_are_the_defaults(ini: Path) -> None:
    shipped = config.load(written(ini, config.SHIPPED_INI.read_text(encoding="utf-8")), {})
    assert shipped == config.load(written(ini, ""), {})


def test_the_graph_api_is_asked_in_the_version_that_is_named_newest() -> None:
    assert config.Instagram().graph_url == "https://graph.instagram.com/v27.0"


def test_a_partial_file_leaves_the_rest_at_its_defaults(ini: Path) -> None:
    found = config.load(written(ini, "[web]\nport = 9000\n"), {})
    assert found.web == replace(config.Web(), port=9000)
    assert found.delivery == config.Delivery()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        pytest.param("[wev]\nport = 1", ("[wev] port", "no section"), id="section"),
        pytest.param("[web]\nprot = 1", ("[web] prot", "no such key"), id="key"),
        pytest.param("[web]\nport = http", ("[web] port", "'http'"), id="no number"),
        pytest.param("[web]\nport = 70000", ("[web] port", "between 0 and 65535"), id="out of range"),
        pytest.param("[crm]\ntimeout_s = nan", ("[crm] timeout_s", "between"), id="not a number"),
        pytest.param("[crm]\nallow_http = perhaps", ("[crm] allow_http", "true or false"), id="flag"),
        pytest.param("[crm]\nallow_networks = 10.0.0.1/8", ("[crm] allow_networks", "10.0.0.1/8"), id="network"),
        pytest.param("[instagram]\ngraph_url = ftp://x", ("[instagram] graph_url", "http"), id="url"),
        pytest.param("[delivery]\ncrm_quick_s =", ("[delivery] crm_quick_s", "one or more"), id="no delays"),
        pytest.param("[delivery]\ncrm_quick_s = 1 2m", ("[delivery] crm_quick_s", "number of seconds"), id="unit"),
        pytest.param("[delivery]\ncrm_give_up_s = 24h", ("'24h'", "must be a number of seconds"), id="hours"),
        pytest.param("[delivery]\ncrm_quick_s = 0", ("[delivery] crm_quick_s", "0.1"), id="delay out of range"),
        pytest.param("[delivery]\nsenders = 4", ("[delivery] slots_per_endpoint", "senders"), id="two keys at odds"),
        pytest.param("[log]\nlevel = loud", ("[log] level", "debug, info"), id="choice"),
        pytest.param("[web]\nport = 1\nport = 2", ("port", "already exists"), id="key twice"),
        pytest.param("port = 1", ("no section headers",), id="no section at all"),
    ],
)
def test_a_mistake_is_named_with_its_place(ini: Path, text: str, named: tuple[str, ...]) -> None:
    with pytest.raises(Misconfigured) as failure:
        config.load(written(ini, text), {})
    assert str(ini) in failure.value.message
    for words in named:
        assert words in failure.value.message


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [
        ("CRMBRIDGE_WEB_PORT", "http", "bad value 'http'"),
        ("CRMBRIDGE_WEB_PROT", "1", "no such key"),
        ("CRMBRIDGE_WEV_PORT", "1", "no section [wev]"),
    ],
)
def test_a_mistake_in_the_environment_names_the_variable(ini: Path, variable: str, value: str, named: str) -> None:
    with pytest.raises(Misconfigured, match=variable) as failure:
        config.load(written(ini, ""), {variable: value})
    assert named in failure.value.message


def test_the_environment_overrides_the_file(ini: Path) -> None:
    environ = {"CRMBRIDGE_WEB_PORT": "9001", "CRMBRIDGE_STORE_QUEUE_PATH": "/elsewhere/queue.db", "HOME": "/"}
    found = config.load(written(ini, "[web]\nport = 9000\nhost = ::1\n"), environ)
    assert (found.web.port, found.web.host) == (9001, "::1")
    assert found.store.queue_path == Path("/elsewhere/queue.db")


def test_the_variable_that_names_the_file_is_no_setting(ini: Path) -> None:
    assert config.load(written(ini, ""), {"CRMBRIDGE_CONFIG": str(ini)}).web == config.Web()


def test_a_missing_or_unreadable_file_is_named(ini: Path) -> None:
    with pytest.raises(Misconfigured, match="crmbridge init"):
        config.load(ini, {})
    ini.write_bytes(b"[web]\nhost = \xff\n")
    with pytest.raises(Misconfigured, match="cannot be read"):
        config.load(ini, {})


def test_secrets_are_masked_in_what_is_shown_and_in_errors(ini: Path) -> None:
    text = (
        "[instagram]\napp_secrets = hush-hush-1 hush-hush-2\nverify_token = hush-3\n[alerts]\nurl = https://x/hush-4\n"
    )
    shown = config.shown(config.load(written(ini, text), {}))
    assert {name for name, value in shown.items() if value == "(set)"} == {
        "instagram.app_secrets",
        "instagram.verify_token",
        "alerts.url",
    }
    assert "hush" not in "".join(shown.values())
    with pytest.raises(Misconfigured) as failure:
        config.load(written(ini, "[alerts]\nurl = hush-5\n"), {})
    assert "[alerts] url" in failure.value.message
    assert "hush" not in failure.value.message


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.hush.example:99999/hush", "https://hooks.hush.example:0/hush", "https://hush.example:hush/",
        "https://hush.example\N{FULLWIDTH SOLIDUS}hush/x", "https://hush\N{FULLWIDTH COMMERCIAL AT}hush.example/",
        "https://[hush]/hush", "https://hush.127.1/hush", "https://hu%00sh/hush", "https://hush..example/", "ftp://hush/",
        "https:///hush", "hush",
    ],
)  # fmt: skip
def test_an_alert_url_that_can_never_work_is_named_by_its_place_alone(ini: Path, url: str) -> None:
    with pytest.raises(Misconfigured) as failure:
        config.load(written(ini, f"[alerts]\nurl = {url}\n"), {})
    assert failure.value.message.startswith(f"{ini} [alerts] url: bad value: ")
    assert "hush" not in failure.value.message


@pytest.mark.parametrize("url", ["https://hooks.example:8443/a?b=c", "http://localhost:1/", "https://[::1]:65535/x"])
def test_an_alert_url_that_may_work_is_taken(ini: Path, url: str) -> None:
    assert config.load(written(ini, f"[alerts]\nurl = {url}\n"), {}).alerts.url == url.rstrip("/")


def test_what_is_shown_names_every_key(ini: Path) -> None:
    shown = config.shown(config.load(written(ini, ""), {}))
    assert set(shown) == {f"{name}.{entry.name}" for name, cls in config._SECTIONS.items() for entry in fields(cls)}
    assert shown["delivery.crm_quick_s"] == "1 2 4 8 16"
    assert shown["instagram.app_secrets"] == "(not set)"


def test_relative_paths_begin_at_the_files_folder(
    ini: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    written(ini, "[store]\npath = data/b.db\n[vault]\nkey_file = /etc/key\n[crm]\nca_file = own-ca.pem\n")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    found = config.load(ini, {})
    assert found.store.path == ini.parent / "data/b.db"
    assert found.store.queue_path == ini.parent / "var/queue.db"
    assert found.vault.key_file == Path("/etc/key")
    assert found.crm.ca_file == ini.parent / "own-ca.pem"


def test_a_relative_file_name_roots_at_its_folder_too(ini: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(ini, "")
    monkeypatch.chdir(ini.parent)
    assert config.load(Path("crmbridge.ini"), {}).store.path == ini.parent.resolve() / "var/bridge.db"


def test_the_file_is_found_in_the_order_that_is_promised(ini: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ini.parent)
    monkeypatch.setattr(config, "SYSTEM_INI", written(ini.parent / "system.ini", ""))
    assert config.find("named.ini", {"CRMBRIDGE_CONFIG": "env.ini"}) == Path("named.ini")
    assert config.find(None, {"CRMBRIDGE_CONFIG": "env.ini"}) == Path("env.ini")
    assert config.find(None, {}) == ini.parent / "system.ini"
    written(ini, "")
    assert config.find(None, {}) == Path("crmbridge.ini")
