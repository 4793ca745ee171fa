"""``crmbridge doctor`` and ``support-bundle`` as root types them on an installed server."""

import json
from typing import Any

import pytest

from tests.appliance.box import Box

pytestmark = pytest.mark.appliance


def look(box: Box, *words: str) -> tuple[int, dict[str, Any]]:
    done = box.run("crmbridge", "doctor", "--json", *words, check=False)
    shown = json.loads(done.stdout)
    assert done.returncode == shown["status"]
    return done.returncode, {one["slug"]: one for one in shown["findings"]}


def test_doctor_tells_a_fresh_server_what_is_missing_and_a_stopped_one_to_be_started(installed: Box) -> None:
    box = installed
    status, found = look(box)
    assert status == 2
    assert {slug for slug, one in found.items() if one["level"] == "error"} == {"app_secrets_empty"}
    missing = {"verify_token_empty", "alerts_unheard", "public_url_empty"}
    assert {slug for slug, one in found.items() if one["level"] == "warning"} == missing
    assert "rc-service crmbridge restart" in found["app_secrets_empty"]["todo"]
    assert {"health", "memory", "files", "log"} <= set(found)
    assert found["memory"]["what"].count("PSS") == 1
    assert "code_writable" not in found
    box.run("sh", "-c", "cp /etc/crmbridge/crmbridge.ini /tmp/copy.ini; chmod 644 /tmp/copy.ini")
    for more in ("", " --config /tmp/copy.ini"):
        stranger = box.run("su", "-s", "/bin/sh", "nobody", "-c", f"crmbridge doctor --no-calls{more}", check=False)
        assert "run it as root" in stranger.stdout, stranger.stdout
        assert stranger.returncode == 3, stranger.stdout
    said = box.run("rc-service", "crmbridge", "doctor", check=False).stdout
    assert "BROKEN  [instagram] app_secrets is empty" in said
    box.run("crmbridge", "support-bundle", "/root/bundle.tar.gz")
    assert "doctor.json" in box.run("tar", "-tzf", "/root/bundle.tar.gz").stdout
    assert box.run("stat", "-c", "%U %a", "/root/bundle.tar.gz").stdout == "root 600\n"
    box.run("rc-service", "crmbridge", "stop")
    _, found = look(box)
    for slug in ("worker_dead", "not_serving"):
        assert found[slug]["level"] == "error"
        assert found[slug]["todo"].startswith("rc-service crmbridge start")
    box.run("touch", "/var/lib/crmbridge/bridge.db.planted")
    _, found = look(box, "--no-calls")
    assert found["wrong_owner"]["todo"].endswith(" /var/lib/crmbridge/bridge.db.planted")
    box.run("sh", "-c", found["wrong_owner"]["todo"])
    assert "wrong_owner" not in look(box, "--no-calls")[1]
    assert box.run("find", "/var/lib/crmbridge", "!", "-user", "crmbridge").stdout == ""
