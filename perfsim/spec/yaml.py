"""Plain YAML, read defensively: mappings, lists and scalars, nothing that can execute, expand or hide.

The reader works on parser events and builds values itself, for three reasons: tags and aliases are refused before
anything is constructed, nesting is bounded, and scalars follow the YAML 1.2 core schema, so that `1e-3` is a number
and `off`, `010` or `12:30` are not silently turned into something else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from perfsim.errors import InputError
from perfsim.spec.problems import shorten

MAX_FILE_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_NUMBER_LENGTH = 64
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INTEGER = re.compile(r"[-+]?[0-9]+\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|nan)\Z", re.IGNORECASE)
_CONSTANTS = {"": None, "~": None, "null": None, "true": True, "false": False}


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; its keys are text.

    Raises InputError, naming file and line, for a missing, binary or oversized file (more than 1 MiB), a syntax
    error, a tag, an anchor or alias, a duplicate key, nesting beyond 32 levels, NaN or infinity, several documents,
    and a top level that is not a mapping.
    """
    where = str(path)
    value = _Builder(read_text(path, what="YAML file"), where=where).document()
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a mapping of keys to values at the top level, got {_kind(value)}")
    return value


def parse_yaml_value(text: str) -> Any:
    """One value as YAML reads it: `8`, `0.5`, `true`, `500ms`, `[1, 2]`, `{p95: 500ms}`; an empty text is null.

    Raises InputError under the same rules as `load_yaml`.
    """
    where = f"value '{shorten(text)}'"
    if len(text) > MAX_FILE_BYTES:
        raise InputError(f"{where}: longer than {MAX_FILE_BYTES} characters")
    return _Builder(text, where=where).document()


def read_text(path: str | Path, *, what: str, max_bytes: int = MAX_FILE_BYTES) -> str:
    """The text of a small UTF-8 file; InputError when it is missing, oversized, binary or not UTF-8."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise InputError(f"{what} '{path}' does not exist") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"{what} '{shorten(str(path))}' cannot be read: {reason}") from None
    if len(data) > max_bytes:
        raise InputError(f"{path}: larger than {max_bytes} bytes, not a {what}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a {what}: byte {error.start} is not UTF-8 text") from None
    if "\0" in text:
        raise InputError(f"{path}: not a {what}: it holds binary data")
    return text


class _Builder:
    """Turns the event stream of one document into plain Python values."""

    def __init__(self, text: str, *, where: str) -> None:
        self._where = where
        self._events: Iterator[Any] = iter(yaml.parse(text, Loader=_LOADER))

    def document(self) -> Any:
        event = self._next()
        while isinstance(event, (yaml.StreamStartEvent, yaml.DocumentStartEvent)):
            event = self._next()
        if isinstance(event, yaml.StreamEndEvent):
            return None
        value = self._value(event, depth=0)
        self._next()
        following = self._next()
        if not isinstance(following, yaml.StreamEndEvent):
            raise self._error(following, "expected one document, found a second one")
        return value

    def _next(self) -> Any:
        try:
            return next(self._events)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = f" line {mark.line + 1}:" if mark is not None else ""
            raise InputError(f"{self._where}:{line} not valid YAML: {error.problem or error.context}") from None
        except (yaml.YAMLError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{self._where}: not valid YAML: {shorten(reason)}") from None

    def _value(self, event: Any, *, depth: int) -> Any:
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise self._error(event, "anchors and aliases are not allowed; write the value out")
        if getattr(event, "tag", None):
            raise self._error(event, f"the tag '{shorten(event.tag)}' is not allowed; use plain YAML")
        if depth > MAX_DEPTH:
            raise self._error(event, f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(depth)
        return self._mapping(depth)

    def _sequence(self, depth: int) -> list[Any]:
        items = []
        while not isinstance(event := self._next(), yaml.SequenceEndEvent):
            items.append(self._value(event, depth=depth + 1))
        return items

    def _mapping(self, depth: int) -> dict[str, Any]:
        items: dict[str, Any] = {}
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent) or event.tag or event.anchor:
                raise self._error(event, "expected a plain name as key")
            if event.value == "<<":
                raise self._error(event, "merge keys ('<<') are not allowed; write the values out")
            if event.value in items:
                raise self._error(event, f"duplicate key '{shorten(event.value)}'")
            items[event.value] = self._value(self._next(), depth=depth + 1)
        return items

    def _scalar(self, event: Any) -> Any:
        text: str = event.value
        if event.style not in (None, ""):
            return text
        if text.lower() in _CONSTANTS:
            return _CONSTANTS[text.lower()]
        if _NOT_FINITE.match(text):
            raise self._error(event, f"expected a finite number, got '{text}'")
        if not _FLOAT.match(text):
            return text
        if len(text) > MAX_NUMBER_LENGTH:
            raise self._error(event, f"a number of {len(text)} characters; expected at most {MAX_NUMBER_LENGTH}")
        if _INTEGER.match(text):
            return int(text)
        number = float(text)
        if not math.isfinite(number):
            raise self._error(event, f"'{text}' is too large for a number")
        return number

    def _error(self, event: Any, message: str) -> InputError:
        return InputError(f"{self._where}: line {event.start_mark.line + 1}: {message}")


def _kind(value: object) -> str:
    if value is None:
        return "nothing"
    return "a list" if isinstance(value, list) else f"'{shorten(str(value))}'"
