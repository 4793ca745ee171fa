"""What Instagram takes from a shop: its limits, checked before it is called, and the body of each form.

Sources: Instagram Platform, "Messaging API" with its pages on quick replies, templates and sender actions.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from crmbridge.errors import Invalid

TEXT_BYTES = 1000
IMAGES = 10
QUICK_REPLIES, QUICK_REPLY_TITLE = 13, 20
ELEMENTS, BUTTONS = 10, 3
ELEMENT_TEXT, BUTTON_TEMPLATE_TEXT = 80, 640


def _endings(names: str) -> frozenset[str]:
    return frozenset(names.split())


_EXTENSIONS = {
    "image": _endings("png jpg jpeg gif"),
    "audio": _endings("aac m4a wav mp4"),
    "video": _endings("mp4 ogg avi mov webm"),
    "file": _endings("pdf"),
}
# An ending that is none of these, such as .php, says nothing of what the address leads to.
_TELLING = _endings("").union(*_EXTENSIONS.values()) | _endings(
    """mp3 oga opus flac amr wma aiff mid webp heic heif avif bmp tif tiff svg ico psd mkv wmv flv 3gp m4v mpg mpeg ogv
    doc docx xls xlsx ppt pptx odt ods odp txt csv rtf md zip rar 7z gz tar exe apk dmg json xml epub"""
)

Problem = tuple[str, str, str]  # slug, field, what is wrong


def check(content: Mapping[str, Any]) -> list[str]:
    """Hold a message to Instagram's limits; return the warnings. Raises Invalid with every field at fault.

    Sizes and real types of media are seen only by who fetches them: they stay Instagram's to check.
    """
    problems = [
        *_together(content),
        *_text(content),
        *_attachments(content.get("attachments", ())),
        *_quick_replies(content),
        *_template(content.get("template")),
        *_reaction(content.get("reaction")),
    ]
    if problems:
        details = [{"field": field, "problem": problem} for _, field, problem in problems]
        slug, field, problem = problems[0]
        raise Invalid(f"{field} {problem}.", code=slug, details=details)
    cut = any(len(one["title"]) > QUICK_REPLY_TITLE for one in content.get("quick_replies", ()))
    return ["quick_reply_title_cut"] if cut else []


def _together(content: Mapping[str, Any]) -> Iterator[Problem]:
    """Find what does not go together: an action travels alone, and a private reply answers its comment."""
    if "comment_id" in content and is_action(content):
        yield "invalid_request", "comment_id", "takes no reaction and no action"
    if "reply_to" in content and ("comment_id" in content or is_action(content)):
        yield "invalid_request", "reply_to", "goes neither with a comment_id nor with a reaction or an action"
    if "quick_replies" in content and "text" not in content:
        yield "invalid_request", "quick_replies", "go with a message only"


def _text(content: Mapping[str, Any]) -> Iterator[Problem]:
    size = len(content.get("text", "").encode())
    if size > TEXT_BYTES:
        yield "message_too_long", "message", f"has {size} UTF-8 bytes; Instagram takes {TEXT_BYTES}"


def _attachments(attachments: Sequence[Mapping[str, Any]]) -> Iterator[Problem]:
    if len(attachments) > IMAGES:
        yield "too_many_attachments", "attachments", f"are {len(attachments)}; Instagram takes {IMAGES} images"
    elif len(attachments) > 1 and any(one["type"] != "image" for one in attachments):
        yield "too_many_attachments", "attachments", "may be several only when all are images"
    for number, one in enumerate(attachments):
        field, url = f"attachments.{number}.url", one.get("url")
        if one["type"] == "like_heart":
            if url:
                yield "invalid_request", field, "is not for a like_heart"
        elif not url:
            yield "invalid_request", field, "is required"
        else:
            yield from _media(one["type"], field, url)


def _media(kind: str, field: str, url: str) -> Iterator[Problem]:
    try:
        path = urlsplit(url).path
    except ValueError:
        yield "invalid_request", field, "is not a URL"
        return
    ending = path.rsplit("/", 1)[-1].rpartition(".")[2].lower()
    if ending in _TELLING - _EXTENSIONS[kind]:
        takes = ", ".join(sorted(_EXTENSIONS[kind]))
        yield "media_type_unsupported", field, f"ends in .{ending}; as {kind} Instagram takes {takes}"


def _quick_replies(content: Mapping[str, Any]) -> Iterator[Problem]:
    replies = content.get("quick_replies", ())
    if len(replies) > QUICK_REPLIES:
        yield "too_many_quick_replies", "quick_replies", f"are {len(replies)}; Instagram takes {QUICK_REPLIES}"


def _template(template: Mapping[str, Any] | None) -> Iterator[Problem]:
    if template is None:
        return
    wanted, others = ["elements"], ["text", "buttons"]
    if template["template_type"] == "button":
        wanted, others = others, wanted
    for name in wanted:
        if not template.get(name):
            yield "invalid_request", f"template.{name}", f"is required for a {template['template_type']} template"
    for name in others:
        if name in template:
            yield "invalid_request", f"template.{name}", f"is not for a {template['template_type']} template"
    yield from _length("template.text", template.get("text"), BUTTON_TEMPLATE_TEXT)
    yield from _buttons("template.buttons", template.get("buttons", ()))
    elements = template.get("elements", ())
    if len(elements) > ELEMENTS:
        yield "too_many_elements", "template.elements", f"are {len(elements)}; Instagram takes {ELEMENTS}"
    for number, element in enumerate(elements):
        at = f"template.elements.{number}"
        yield from _length(f"{at}.title", element["title"], ELEMENT_TEXT)
        yield from _length(f"{at}.subtitle", element.get("subtitle"), ELEMENT_TEXT)
        yield from _buttons(f"{at}.buttons", element.get("buttons", ()))
        if "image_url" in element:
            yield from _media("image", f"{at}.image_url", element["image_url"])


def _length(field: str, text: str | None, most: int) -> Iterator[Problem]:
    if text is not None and len(text) > most:
        yield "template_text_too_long", field, f"has {len(text)} characters; Instagram takes {most}"


def _buttons(field: str, buttons: Sequence[Mapping[str, Any]]) -> Iterator[Problem]:
    if len(buttons) > BUTTONS:
        yield "too_many_buttons", field, f"are {len(buttons)}; Instagram takes {BUTTONS}"
    for number, button in enumerate(buttons):
        needs, other = ("url", "payload") if button["type"] == "web_url" else ("payload", "url")
        if needs not in button:
            yield "invalid_request", f"{field}.{number}.{needs}", f"is required for a {button['type']} button"
        if other in button:
            yield "invalid_request", f"{field}.{number}.{other}", f"is not for a {button['type']} button"


def _reaction(reaction: Mapping[str, Any] | None) -> Iterator[Problem]:
    if reaction is not None and reaction["action"] == "react" and "emoji" not in reaction:
        yield "invalid_request", "reaction.emoji", "is required to react"


def is_action(content: Mapping[str, Any]) -> bool:
    """Tell whether a send leaves no message: Instagram answers without an id, and a repetition changes nothing."""
    return "action" in content or "reaction" in content


def names_object(content: Mapping[str, Any]) -> bool:
    """Tell whether a send names something at Instagram beside its recipient: a message or a comment."""
    return bool(content.keys() & {"reply_to", "reaction", "comment_id"})


def is_sound_or_film(content: Mapping[str, Any]) -> bool:
    """Tell whether a send carries audio or video, of which Instagram takes fewer a second ("Rate limits")."""
    return any(one["type"] in ("audio", "video") for one in content.get("attachments", ()))


def body(content: Mapping[str, Any], contact: str) -> dict[str, Any]:
    """Return the body of the call that sends a message, in the form of Meta's documentation."""
    recipient = {"comment_id": content["comment_id"]} if "comment_id" in content else {"id": contact}
    if "action" in content:  # travels alone
        return {"recipient": recipient, "sender_action": content["action"]}
    if "reaction" in content:
        reaction = content["reaction"]
        about = {"message_id": reaction["external_id"]}
        if reaction["action"] == "react":
            about["reaction"] = reaction["emoji"]
        return {"recipient": recipient, "sender_action": reaction["action"], "payload": about}
    told: dict[str, Any] = {"recipient": recipient, "message": _message(content)}
    if "reply_to" in content:
        told["reply_to"] = {"mid": content["reply_to"]}
    if content.get("human_agent"):
        told["tag"] = "HUMAN_AGENT"
    return told


def _message(content: Mapping[str, Any]) -> dict[str, Any]:
    if "template" in content:
        return {"attachment": {"type": "template", "payload": content["template"]}}
    if "attachments" in content:
        attachments = [_attachment(one) for one in content["attachments"]]
        return {"attachment": attachments[0]} if len(attachments) == 1 else {"attachments": attachments}
    message = {"text": content["text"]}
    if "quick_replies" in content:
        message["quick_replies"] = [{"content_type": "text", **one} for one in content["quick_replies"]]
    return message


def _attachment(one: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": one["type"], "payload": {"url": one["url"]}} if "url" in one else {"type": one["type"]}
