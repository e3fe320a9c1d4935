"""Parses the words of an engine's command line as its own argparse would: abbreviations, `=`, negative numbers.

What differs from argparse is only how it ends: every mistake is one InputError that names the nearest valid flag.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from perfsim.errors import InputError, nearest
from perfsim.spec.command_line.table import Flag, FlagTable
from perfsim.spec.problems import shorten

_HUMAN = re.compile(r"(\d+(?:\.\d+)?)([kKmMgGtT])\Z")
_DECIMAL = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_LISTED_CHOICES = 12


@dataclass(frozen=True, slots=True)
class Given:
    """One flag as it was given, and its value."""

    flag: Flag
    value: Any


@dataclass(frozen=True, slots=True)
class Parsed:
    """The positional model, if any, and the flags in the order of the command line."""

    model: str | None
    given: tuple[Given, ...]


def parse(words: Sequence[str], table: FlagTable) -> Parsed:
    """The flags of a command line without its program name; InputError for anything the engine would refuse."""
    parser = _Parser(prog=table.program, add_help=False, allow_abbrev=table.abbreviations)
    words = [_respelled(word, table) for word in words]
    spelled = {word.split("=")[0] for word in words}
    for flag in table.flags:
        if not flag.former or spelled.intersection(flag.names):  # what is gone makes no abbreviation ambiguous
            _add(parser, flag)
    namespace = argparse.Namespace(given=[])
    _, rest = parser.parse_known_args(_with_dotted_json(words) if table.dotted_json else words, namespace)
    unknown = next((word for word in rest if word.startswith("-") and len(word) > 1), None)
    if unknown is not None:
        name = unknown.split("=")[0]
        valid = [name for flag in table.flags for name in flag.names if name.startswith("--")]
        raise InputError(f"unknown flag '{shorten(name)}' of {table.program} {table.version}{nearest(name, valid)}")
    if len(rest) > 1 or (rest and table.model_first and rest[0] != words[0]):
        listed = ", ".join(f"'{shorten(word)}'" for word in rest[:4])
        raise InputError(f"expected one model besides the flags, got {listed}")
    return Parsed(rest[0] if rest else None, tuple(namespace.given))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(shorten(message.removeprefix("argument "), 300))


class _Record(argparse.Action):
    """Appends (flag, value) to `given`, so that the order and the repetitions of a command line are kept."""

    def __init__(self, *, flag: Flag, **options: Any) -> None:
        super().__init__(**{**options, "default": argparse.SUPPRESS})
        self.flag = flag

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:  # fmt: skip
        if self.nargs == 0:
            values = not (self.flag.kind == "bool" and (option_string or "").startswith("--no-"))
        namespace.given.append(Given(self.flag, values))


def _add(parser: _Parser, flag: Flag) -> None:
    if flag.kind in ("bool", "switch"):
        off = [f"--no-{name[2:]}" for name in flag.names if name.startswith("--") and flag.kind == "bool"]
        parser.add_argument(*flag.names, *off, action=_Record, flag=flag, nargs=0)
    else:
        parser.add_argument(*flag.names, action=_Record, flag=flag, nargs=flag.nargs, type=_reader(flag))


def _reader(flag: Flag) -> Callable[[str], Any]:
    convert, expected = _KINDS[flag.kind]

    def read(text: str) -> Any:
        try:
            value = convert(text)
        except (ValueError, OverflowError, RecursionError):
            raise argparse.ArgumentTypeError(f"expected {expected}, got '{shorten(text)}'") from None
        # What has no effect here may come from another version of the engine, with other choices.
        if flag.choices and value not in flag.choices and flag.role in ("key", "rule"):
            valid = [str(choice) for choice in flag.choices]
            listed = ", ".join(valid[:_LISTED_CHOICES]) + (", ..." if len(valid) > _LISTED_CHOICES else "")
            raise argparse.ArgumentTypeError(f"expected one of {listed}; got '{shorten(text)}'{nearest(text, valid)}")
        return value

    return read


def _human_int(text: str) -> int:
    """vLLM's `human_readable_int`: 1k is 1000, 1K is 1024, 25.6k is 25600."""
    match = _HUMAN.match(text.strip())
    if match is None:
        return int(text)
    number, suffix = match.groups()
    return int(float(number) * _DECIMAL[suffix]) if suffix in _DECIMAL else int(number) * _BINARY[suffix]


def _si_int(text: str) -> int:
    """SGLang's `human_readable_int`: 1k is 1000, 1M is a million, 1Ki is 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(k|[MGT]|[KMGT]i)", text.strip())
    if match is None:
        return int(text)
    number, suffix = match.groups()
    return int(number) * _BINARY[suffix[0]] if suffix.endswith("i") else int(float(number) * _DECIMAL[suffix.lower()])


def _human_int_or_auto(text: str) -> int:
    return -1 if text.strip().lower() == "auto" else _human_int(text)


def _json(text: str) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


_KINDS: dict[str, tuple[Callable[[str], Any], str]] = {
    "int": (int, "an integer"), "float": (float, "a number"), "str": (str, "text"),
    "human_int": (_human_int, "an integer such as 8192, 32k or 1M"),
    "si_int": (_si_int, "an integer such as 8192, 32k or 32Ki"),
    "human_int_or_auto": (_human_int_or_auto, "an integer such as 8192, 32k or 1M, or auto"),
    "json": (_json, "JSON"),
}  # fmt: skip


def _respelled(word: str, table: FlagTable) -> str:
    """A flag with the separators the engine's names have, where the engine accepts both."""
    if not word.startswith("--") or table.separator is None:
        return word
    end = min((at for at in map(word.find, ".=") if at >= 0), default=len(word))
    other = {"-": "_", "_": "-"}[table.separator]
    return "--" + word[2:end].replace(other, table.separator) + word[end:]


def _with_dotted_json(words: Sequence[str]) -> list[str]:
    """`--json-arg.key value` and `--json-arg.list+ a,b` become one JSON value at the end, `-O3` its long form.

    As `FlexibleArgumentParser.parse_args` of vllm/utils/argparse_utils.py does.
    """
    plain: list[str] = []
    dotted: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if re.match(r"-O=?\w", word):
            plain += ["--optimization-level", word[2:].removeprefix("=")]
        elif word.startswith("-") and "." in name and not re.match(r"-\.?\d", word):
            if not equals:
                value = next(rest, "")
            key, *path = name.rstrip("+").split(".")
            _put(dotted.setdefault(key, {}), path, value.split(",") if name.endswith("+") else _json_or_text(value))
        else:
            plain.append(word)
    return [*plain, *(word for key, value in dotted.items() for word in (key, json.dumps(value)))]


def _put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for key in path[:-1]:
        below = tree.get(key)
        tree[key] = below if isinstance(below, dict) else {}
        tree = tree[key]
    tree[path[-1]] = value


def _json_or_text(text: str) -> Any:
    for read in (_json, _human_int):
        try:
            return read(text)
        except (ValueError, RecursionError):
            continue
    return text
