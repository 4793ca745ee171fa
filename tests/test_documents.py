"""README and docs/: what they point to is there, and the events that they show are real."""

import json
import re
from pathlib import Path

import pytest

from crmbridge.config import ROOT
from tests import spec

DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])


def prose(path: Path) -> str:
    """Return a document without its blocks of code."""
    return re.sub(r"^( *)```.*?^\1```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_to_a_file_and_a_heading_that_are_there(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if not link.startswith("https://"):
            place, _, anchor = link.partition("#")
            target = (document.parent / place).resolve() if place else document
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_every_document_is_reached_from_readme() -> None:
    seen, ahead = set(), [ROOT / "README.md"]
    while ahead:
        document = ahead.pop()
        seen.add(document)
        if document.suffix == ".md":
            places = re.findall(r"\]\(([^)#:\s]+)(?:#[^)\s]*)?\)", prose(document))
            ahead += {(document.parent / place).resolve() for place in places} - seen
    assert seen >= {path for path in (ROOT / "docs").rglob("*") if path.is_file()}


def test_the_events_that_the_document_shows_are_events_of_the_spec() -> None:
    blocks = re.findall(r"^```json\n(.*?)^```$", (ROOT / "docs" / "crm.md").read_text(), re.MULTILINE | re.DOTALL)
    events = [event for event in map(json.loads, blocks) if "event" in event]
    assert [event["event"] for event in events] == ["message.received", "message.failed"]
    for event in events:
        operation = spec.load()["webhooks"][event["event"]]["post"]
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        assert spec.misfits(schema, event) == []
