"""From untrusted mappings to descriptions: the first thing that is wrong becomes one line that says what and where."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from perfsim.errors import InputError, nearest
from perfsim.spec.yaml import one_line

SpecType = TypeVar("SpecType", bound=BaseModel)


def validated(cls: type[SpecType], data: Mapping[str, Any], *, where: str) -> SpecType:
    """An instance of `cls` from `data`; InputError naming `where`, the key, what was expected and what was found."""
    try:
        return cls.model_validate(dict(data))
    except ValidationError as error:
        raise InputError(f"{where}: {_describe(error, cls)}") from None


def _describe(error: ValidationError, cls: type[BaseModel]) -> str:
    first = error.errors(include_url=False)[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = sorted(set(_field_names(cls, seen=set())))
        return f"unknown key '{one_line(path, 80)}'{nearest(str(first['loc'][-1]), known)}"
    if first["type"] == "missing":
        return f"missing key '{one_line(path, 80)}'"
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    label = f"{one_line(path, 80)}: " if path else ""
    value = first["input"]
    got = "" if isinstance(value, (dict, BaseModel)) or "got" in message else f", got {one_line(repr(value), 80)}"
    return f"{label}{one_line(message, 300)}{got}"


def _field_names(cls: type[BaseModel], *, seen: set[type]) -> Iterator[str]:
    if cls in seen:
        return
    seen.add(cls)
    for name, field in cls.model_fields.items():
        yield name
        for inner in _models_in(field.annotation):
            yield from _field_names(inner, seen=seen)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)
