"""One pydantic ValidationError becomes one line: where it is, what was expected, what was given, what was meant."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from perfsim.errors import InputError, nearest

S = TypeVar("S", bound=BaseModel)
Location = tuple[int | str, ...]

# Tags of a union of a name and the thing itself; like the values of `kind`, they appear in pydantic's locations only.
NAME, INLINE, CLUSTER = "name", "inline", "cluster"

_EXPECTED = {
    "int_type": "an integer", "int_parsing": "an integer", "int_from_float": "an integer",
    "int_parsing_size": "an integer of ordinary size", "float_type": "a number", "float_parsing": "a number",
    "finite_number": "a finite number", "bool_type": "true or false", "bool_parsing": "true or false",
    "string_type": "text", "dict_type": "a section of keys", "model_type": "a section of keys",
    "model_attributes_type": "a section of keys", "tuple_type": "a list", "list_type": "a list",
}  # fmt: skip
_BOUNDS = {
    "greater_than": ("gt", "greater than"), "greater_than_equal": ("ge", "of at least"),
    "less_than": ("lt", "less than"), "less_than_equal": ("le", "of at most"),
}  # fmt: skip


def validated(cls: type[S], data: Mapping[str, Any], *, where: str | Callable[[str], str]) -> S:
    """`data` as a `cls`, or an InputError about its first problem.

    `where` is the file, or turns the dotted place of a problem (`workload.arrivals.rate`, empty for the whole) into
    what the message begins with. An unknown key is reported before anything else, because a misspelt key also makes
    the right one look missing.
    """
    begin = where if callable(where) else lambda place: f"{where}: {place}" if place else where
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
        message = _describe(cls, data, problems[0], begin)
        if len(problems) > 1:
            message += f" (and {len(problems) - 1} more)"
        raise InputError(message) from None


def _describe(cls: type[BaseModel], data: Mapping[str, Any], problem: ErrorDetails, where: Callable[[str], str]) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    path = _written_path(data, problem["loc"])
    if kind == "extra_forbidden":  # whose key may have the name of a tag
        key, parent = str(problem["loc"][-1]), problem["loc"][:-1]
        path = (*_written_path(data, parent), key)
        valid = sorted(_keys(cls, parent))
        hint = nearest(key, valid) or f"; expected one of {', '.join(valid)}"
        return f"{where(_dotted(path))}: unknown key '{shorten(key)}'{hint}"
    if kind == "missing" and isinstance(path[-1], int):
        return f"{where(_dotted(path[:-1]))}: item {path[-1] + 1} is missing"
    if kind == "missing":
        return f"{where(_dotted(path[:-1]))}: the key '{path[-1]}' is missing"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        valid = sorted(_tags(cls, problem["loc"]))
        if kind == "union_tag_not_found":
            return f"{where(_dotted(path))}: the key 'kind' is missing; expected one of {', '.join(valid)}"
        given = str(context["tag"])
        hint = nearest(given, valid)
        return f"{where(_dotted((*path, 'kind')))}: expected one of {', '.join(valid)}, got '{shorten(given)}'{hint}"
    return f"{where(_dotted(path))}: {_complaint(kind, context, problem)}"


def _complaint(kind: str, context: Mapping[str, Any], problem: ErrorDetails) -> str:
    given = describe(problem["input"])
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        expected = str(context["expected"]).replace(" or ", ", ")
        valid = [name.strip("'") for name in expected.split(", ")]
        return f"expected one of {', '.join(valid)}, got {given}{nearest(str(problem['input']), valid)}"
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return f"expected a number {words} {context[key]:.12g}, got {given}"
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}, got {given}"
    if kind in ("too_long", "too_short"):
        bound = f"at most {context['max_length']}" if kind == "too_long" else f"at least {context['min_length']}"
        return f"expected {bound} items, got {context['actual_length']}"
    message = problem["msg"]
    return f"{message[:1].lower()}{message[1:]}, got {given}"


def describe(value: object) -> str:
    """A value the user wrote, short enough for a one-line message."""
    if value is None:
        return "nothing"
    if isinstance(value, (dict, list, tuple)):
        return "a section of keys" if isinstance(value, dict) else "a list"
    return f"'{shorten(value)}'" if isinstance(value, str) else shorten(str(value))


def shorten(text: str, limit: int = 60) -> str:
    """At most `limit` printable characters on one line."""
    flat = "".join(character if character.isprintable() else " " for character in text)
    return flat if len(flat) <= limit else flat[: limit - 3] + "..."


def _dotted(path: Location) -> str:
    return ".".join(shorten(str(item)) for item in path)


def _written_path(data: object, location: Location) -> Location:
    """pydantic's location without the union tags it inserts, which appear nowhere in what the user wrote."""
    path: list[int | str] = []
    tag_may_follow = True
    for item in location:
        if isinstance(data, Mapping) and tag_may_follow and item in (data.get("kind"), INLINE, CLUSTER):
            tag_may_follow = False
            continue
        if not isinstance(data, (Mapping, list, tuple)) and item in (NAME, INLINE, CLUSTER, "[key]"):
            continue
        if isinstance(data, Mapping):
            data = data.get(str(item))
        elif isinstance(data, (list, tuple)) and isinstance(item, int):
            data = data[item] if item < len(data) else None
        tag_may_follow = True
        path.append(item)
    return tuple(path)


def _keys(cls: type[BaseModel], location: Location) -> set[str]:
    """The keys that are valid at `location` inside `cls`."""
    found: set[str] = set()
    for annotation in _at(cls, location):
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.update(annotation.model_fields)
        elif get_origin(annotation) is dict and get_origin(get_args(annotation)[0]) is typing.Literal:
            found.update(get_args(get_args(annotation)[0]))
    return found


def _tags(cls: type[BaseModel], location: Location) -> set[str]:
    """The values of `kind` among the members of the union at `location`."""
    return {tag for annotation in _at(cls, location) if (tag := _tag(annotation)) is not None}


def _tag(annotation: object) -> str | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel) and "kind" in annotation.model_fields:
        return str(annotation.model_fields["kind"].default)
    return None


def _at(cls: type[BaseModel], location: Location) -> list[Any]:
    """Every type that may stand at `location`; a union tag in it picks the member it names."""
    current: list[Any] = [cls]
    for item in location:
        by_tag = [annotation for annotation in current if _tag(annotation) == item]
        if by_tag:
            current = by_tag
            continue
        following: list[Any] = []
        for annotation in current:
            following.extend(_below(annotation, item))
        current = following or current
    return current


def _below(annotation: Any, item: int | str) -> Iterator[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if item in annotation.model_fields:
            yield from _members(annotation.model_fields[str(item)].annotation)
    elif get_origin(annotation) in (dict, tuple, list):
        yield from _members(get_args(annotation)[0 if get_origin(annotation) is not dict else 1])


def _members(annotation: Any) -> Iterator[Any]:
    """The alternatives of a union, with Annotated peeled off."""
    if get_origin(annotation) is Annotated:
        yield from _members(get_args(annotation)[0])
    elif get_origin(annotation) in (typing.Union, types.UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation
