"""Finds the one command in a pasted text that starts the engine, and what stands around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise

from perfsim.errors import InputError
from perfsim.spec.command_line.shell import Command, split_commands
from perfsim.spec.command_line.table import FlagTable
from perfsim.spec.problems import shorten
from perfsim.spec.yaml import read_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Invocation:
    """The words after the program's name, and what stands around them.

    `environment` are names of variables, `wrapper` the program that starts the engine's, `others` further commands.
    """

    words: tuple[str, ...]
    environment: tuple[str, ...]
    wrapper: tuple[str, ...]
    others: tuple[str, ...]


def find_invocation(text: str, table: FlagTable) -> Invocation:
    """The engine's command in `text`: `@FILE`, a script, a docker line, or only what follows the program.

    Raises InputError when there is none or more than one, and for an unreadable file or an unbalanced quote.
    """
    if text.startswith("@"):
        text = read_text(text[1:], what="command line file")
    commands = [inner for command in split_commands(text) for inner in _inside_shell(command)]
    starts = [start for command in commands if (start := _start(command.words, table)) is not None]
    found = [command for command in commands if _start(command.words, table) is not None]
    with_words = [command for command in commands if command.words]
    if not found and len(with_words) == 1:
        found, starts = with_words, [(0, 0)]  # only a model and flags
    if len(found) != 1:
        problem = f"{len(found)} commands that start it" if found else "no command that starts it"
        raise InputError(f"expected one command line of {table.program}, found {problem}")
    (command,), ((begin, end),) = found, starts
    names = [name for other in commands for name in other.environment] if len(commands) > 1 else [*command.environment]
    before = command.words[:begin]
    return Invocation(
        words=tuple(command.words[end:]),
        environment=tuple(dict.fromkeys([*names, *_passed_variables(before)])),
        wrapper=tuple(word for word in before[:1] if not _is_harmless(word)),
        others=tuple(shorten(" ".join(other.words), 40) for other in with_words if other is not command),
    )


def _start(words: Sequence[str], table: FlagTable) -> tuple[int, int] | None:
    """Where the engine's program begins among the words, and where its arguments begin.

    `serve` without the program's name is one only at the beginning; names of programs and images anywhere.
    """
    for begin in range(len(words)):
        for start in table.starts:
            window = words[begin : begin + len(start)]
            if len(window) == len(start) and _matches(window, start) and (begin == 0 or start != ("serve",)):
                return begin, begin + len(start)
    return None


def _matches(window: Sequence[str], start: Sequence[str]) -> bool:
    # A program may be called by its path, a container image may have a registry before it and a tag behind it.
    first = window[0] if "/" in start[0] else window[0].rsplit("/", 1)[-1]
    image = first.split(":")[0].split("@")[0]
    return (first == start[0] or ("/" in start[0] and image.endswith(start[0]))) and list(window[1:]) == list(start[1:])


def _inside_shell(command: Command) -> list[Command]:
    """The commands in `bash -c "..."`, else the command itself."""
    for index, (program, flag) in enumerate(pairwise(command.words)):
        if program.rsplit("/", 1)[-1] in ("bash", "sh") and flag in ("-c", "-lc") and index + 2 < len(command.words):
            inner = split_commands(command.words[index + 2])
            return [Command({**command.environment, **each.environment}, each.words) for each in inner]
    return [command]


def _is_harmless(program: str) -> bool:
    name = program.rsplit("/", 1)[-1]
    return name.startswith("python") or name in ("env", "exec", "export", "nohup", "sudo", "uv")


def _passed_variables(words: Sequence[str]) -> list[str]:
    """Names of variables that a wrapper passes on, as `docker run -e NAME=value` and `env NAME=value` do."""
    names = []
    for index, word in enumerate(words):
        if word in ("-e", "--env") and index + 1 < len(words):
            names.append(words[index + 1].split("=")[0])
        elif word.startswith("--env="):
            names.append(word.split("=")[1])
    return names


def relevant_variables(names: Sequence[str], table: FlagTable) -> tuple[list[str], list[str]]:
    """(variables that may matter, variables without effect on speed and memory)."""
    harmless = [name for name in names if any(fnmatchcase(name, pattern) for pattern in table.environment)]
    return [name for name in names if name not in harmless], harmless
