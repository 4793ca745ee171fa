"""Objects as Meta tells them, read key by key: what nobody has read is passed on as it came. Knows none of the keys."""

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

_DEPTH = 64  # what is passed on as JSON; what is nested deeper is passed on as text
_Read = TypeVar("_Read")


class Told:
    """An object that is being read.

    A known key whose value is of another kind than it should be is not read; one that says nothing is.
    """

    def __init__(self, told: Mapping[str, Any]) -> None:
        self._left = dict(told)

    def get(self, name: str) -> Any:
        """Return a value that has not been read; None when it says nothing."""
        value = self._left.get(name)
        return None if value in ("", [], {}) else value

    def take(self, name: str, read: Callable[[Any], _Read | None]) -> _Read | None:
        """Read a key; None when it says nothing, or nothing of the kind that `read` knows."""
        value = self.get(name)
        found = None if value is None else read(value)
        if found is not None or value is None:
            self._left.pop(name, None)
        return found

    def part(self, name: str) -> "Told":
        """Return an object inside, an empty one where there is none; what is left of it stays in its place."""
        value = self.take(name, lambda value: value if isinstance(value, dict) else None)
        part = Told(value or {})
        if value:
            self._left[name] = part
        return part

    def leave(self, name: str, rest: Any) -> None:
        """Have only this be left of a key; None for nothing."""
        self._left[name] = rest
        self.take(name, lambda _: None)

    def left(self) -> dict[str, Any]:
        """Return what has not been read."""
        whole = {name: value.left() if isinstance(value, Told) else value for name, value in self._left.items()}
        return {name: value for name, value in whole.items() if value or not isinstance(self._left[name], Told)}


class Parts:
    """The objects that an event is read from, by the names under which a CRM finds what is left of each."""

    def __init__(self) -> None:
        self._parts: dict[str, Told] = {}

    def begin(self, name: str, told: Mapping[str, Any]) -> Told:
        """Begin to read one."""
        self._parts[name] = part = Told(told)
        return part

    def others(self) -> dict[str, dict[str, Any]]:
        """Return what is left of each; a message's own keys stand among those of its item, as ``event``."""
        left = {name: part.left() for name, part in self._parts.items()}
        left["event"] = together(left.pop("message", {}), left.pop("item", {}))
        return {name: shallow(keys) for name, keys in left.items() if keys}


def first(read: Callable[[Any], _Read | None], *places: tuple[Told, str]) -> _Read | None:
    """Read the first of several keys that tells something; another one that tells the same counts as read, too."""
    found: _Read | None = None
    for told, name in places:
        if found is None:
            found = told.take(name, read)
        elif told.get(name) is None or read(told.get(name)) == found:
            told.leave(name, None)
    return found


def together(inner: dict[str, Any], outer: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of an object and of the one around it; those of the same name stand apart."""
    twice = {name: value for name, value in outer.items() if name in inner}
    name = "outer"
    while name in inner or name in outer:
        name += "_"
    return {**outer, **inner, **({name: twice} if twice else {})}


def shown(item: Any) -> Any:
    """Return what may be passed on as JSON: an item as it is, as text when it is nested too deeply."""
    try:
        content = json.dumps(item, sort_keys=True)
    except RecursionError:
        return "an item nested too deeply to be shown"
    return content if _deeper_than(_DEPTH, item) else item


def shallow(value: dict[str, Any]) -> dict[str, Any]:
    """Return an object that may be passed on as JSON."""
    return value if not _deeper_than(_DEPTH, value) else {"value": shown(value)}


def _deeper_than(limit: int, value: Any) -> bool:
    pending = [(value, 0)]
    while pending:
        inner, depth = pending.pop()
        if depth > limit:
            return True
        if isinstance(inner, dict):
            pending += [(entry, depth + 1) for entry in inner.values()]
        elif isinstance(inner, list):
            pending += [(entry, depth + 1) for entry in inner]
    return False
