"""A Hugging Face `config.json` as a typed, checked mapping: whatever is refused is named by file and key."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from perfsim.errors import InputError, nearest
from perfsim.spec.problems import shorten
from perfsim.spec.yaml import read_text

T = TypeVar("T")
MAX_CONFIG_BYTES = 8 << 20  # configs that list every unquantised module reach a few hundred kB
MAX_INTEGER = 2**31 - 1  # no size in a config needs more, and products of a few stay far from overflow


def read_config(path: str | Path) -> Config:
    """The config in a JSON file.

    Raises InputError of one line when the file is missing, oversized, binary, truncated, holds NaN or infinity, or is
    not an object.
    """
    text = read_text(path, what="model file", max_bytes=MAX_CONFIG_BYTES)

    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {error.lineno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise InputError(f"{path}: not a model config: nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {str(error)[:80]}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object with the keys of a config.json, got {_show(content)}")
    # Lists may hold an open end, as Mamba's `time_step_limit: [0.0, Infinity]` does; a value that is one is a mistake.
    for value in content.values():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{path}: expected finite numbers, got {json.dumps(value)}")
    return Config(content, where=str(path))


class Config:
    """Read access to one config; `where` (a file name) starts every error message.

    `names` are other keys under which this config keeps a value, by the key that is asked for (GPT-2 says `n_embd`).
    """

    def __init__(self, content: Mapping[str, Any], *, where: str, names: Mapping[str, str] | None = None) -> None:
        self._content = content
        self.where = where
        self._names = names or {}

    def __contains__(self, key: str) -> bool:
        return self._content.get(self._key(key)) is not None

    def renamed(self, names: Mapping[str, str]) -> Config:
        """The same config, with `names` for keys that it spells in its own way."""
        return Config(self._content, where=self.where, names=names)

    def with_value(self, key: str, value: str) -> Config:
        """The same config with `value` at `key`."""
        return Config({**self._content, key: value}, where=self.where, names=self._names)

    def integer(self, key: str, *, default: int | None = None, minimum: int = 1, maximum: int = MAX_INTEGER) -> int:
        """A whole number in [minimum, maximum]; without `default` the key is required."""
        value = self._get(key, default)
        whole = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value) and value == int(value))
        if isinstance(value, bool) or not whole:
            raise self.error(key, f"expected a whole number, got {_show(value)}")
        if not minimum <= value <= maximum:
            raise self.error(key, f"expected a whole number from {minimum} to {maximum}, got {_show(value)}")
        return int(value)

    def optional_integer(self, key: str) -> int | None:
        """A positive whole number, or None when the key is absent or null."""
        return self.integer(key) if key in self else None

    def number(self, key: str) -> float:
        """A positive finite number."""
        value = self._get(key, None)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_INTEGER:
            raise self.error(key, f"expected a positive number, got {_show(value)}")
        return float(value)

    def flag(self, key: str, *, default: bool) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"expected true or false, got {_show(value)}")
        return value

    def text(self, key: str, *, default: str | None = None) -> str:
        """A string; without `default` the key is required."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"expected text, got {_show(value)}")
        return value

    def items(self, key: str, kind: type[T]) -> list[T]:
        """A list of `kind` (str or int), empty when the key is absent or null."""
        value = self._get(key, [])
        if not isinstance(value, list) or any(not isinstance(v, kind) or isinstance(v, bool) for v in value):
            raise self.error(key, f"expected a list of {kind.__name__}, got {_show(value)}")
        return value

    def section(self, key: str) -> Config | None:
        """A nested object, or None when the key is absent or null."""
        value = self._content.get(self._key(key))
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, f"expected an object, got {_show(value)}")
        return Config(value, where=f"{self.where}: {key}")

    def section_list(self, key: str) -> list[Config]:
        """A list of objects, empty when the key is absent or null."""
        value = self._get(key, [])
        if not isinstance(value, list) or any(not isinstance(entry, dict) for entry in value):
            raise self.error(key, f"expected a list of objects, got {_show(value)}")
        return [Config(entry, where=f"{self.where}: {key}.{index}") for index, entry in enumerate(value)]

    def sections(self) -> list[Config]:
        """All values, each of which must be an object."""
        return [entry for key in self._content if (entry := self.section(key)) is not None]

    def choice(self, key: str, valid: Mapping[str, T], *, default: str | None = None) -> T:
        """The meaning in `valid` of the string at `key`."""
        value = self.text(key, default=default)
        if value not in valid:
            hint = nearest(value, valid)
            raise self.error(key, f"unsupported '{shorten(value)}'{hint}; expected one of {', '.join(valid)}")
        return valid[value]

    def error(self, key: str, message: str) -> InputError:
        """The error to raise about `key`."""
        return InputError(f"{self.where}: {self._key(key)}: {message}")

    def _key(self, key: str) -> str:
        """The key under which the value of `key` stands: its other name, unless the config uses the plain one."""
        return key if self._content.get(key) is not None else self._names.get(key, key)

    def _get(self, key: str, default: Any) -> Any:
        value = self._content.get(self._key(key))
        if value is not None:
            return value
        if default is None:
            raise InputError(f"{self.where}: missing key '{self._key(key)}'")
        return default


def _show(value: object) -> str:
    return shorten(repr(value))
