"""Splits shell text into commands and words, as people paste it: comments, continued lines, quotes, variables.

Only what a launch script needs: nothing is executed, and what a shell would have to execute (`$(...)`, globs, loops)
stays as it is written, so that the option it belongs to complains about it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from perfsim.errors import InputError

MAX_CHARACTERS = 1 << 20
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=")
_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)(?::?-([^{}]*))?\})")
_ENDS = "\n;|&"


@dataclass(slots=True)
class Command:
    """One simple command: the variables set before it, and its words."""

    environment: dict[str, str] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)


def split_commands(text: str) -> list[Command]:
    """The commands of a shell text, in order; `NAME=value` lines and `export`s are expanded in what follows.

    Redirections are dropped. A variable that nothing in the text sets stays as written. Raises InputError for an
    unbalanced quote, and for more than 1 MiB.
    """
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"command line longer than {MAX_CHARACTERS} characters")
    scanner = _Scanner(re.sub(r"\\\r?\n", " ", text).replace("\r\n", "\n"))
    commands = [Command()]
    while (word := scanner.next_word()) is not None:
        if word in ("\n", ";") and scanner.bare:
            if commands[-1].words:
                commands.append(Command())
            continue
        commands[-1].words.append(word)
        _move_assignment(commands[-1], scanner)
    return [command for command in commands if command.words or command.environment]


def _move_assignment(command: Command, scanner: _Scanner) -> None:
    """Take `NAME=value` out of the words when only assignments (or `export`, `env`) stand before it."""
    match = _ASSIGNMENT.match(command.words[-1])
    if match is None or scanner.quoted_name or any(word not in ("export", "env") for word in command.words[:-1]):
        return
    value = command.words.pop()[match.end() :]
    command.environment[match.group(1)] = value
    scanner.variables[match.group(1)] = value


class _Scanner:
    """Reads word after word; `bare` says that the last one was an unquoted operator."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self.variables: dict[str, str] = {}
        self.bare = False
        self.quoted_name = False

    def next_word(self) -> str | None:
        """The next word; a newline or `;` for the end of a command, None at the end of the text."""
        self._skip_blanks()
        if self._at >= len(self._text):
            return None
        self.bare = self._text[self._at] in _ENDS
        if self.bare:
            while self._at < len(self._text) and self._text[self._at] in _ENDS:
                self._at += 1
            return ";"
        self.quoted_name = self._text[self._at] in "'\""
        word = self._word()
        if self.quoted_name:
            return word  # what is quoted redirects nothing
        if re.fullmatch(r"\d*(>{1,2}|<)&?\d*", word):  # a redirection whose target is the next word, or none (2>&1)
            if not word[-1].isdigit():
                self._skip_blanks()
                self._word()
            return self.next_word()
        return self.next_word() if re.match(r"\d*(>{1,2}|<)", word) else word

    def _skip_blanks(self) -> None:
        while self._at < len(self._text):
            if self._text[self._at] in " \t":
                self._at += 1
            elif self._text[self._at] == "#":
                end = self._text.find("\n", self._at)
                self._at = len(self._text) if end < 0 else end
            else:
                return

    def _word(self) -> str:
        parts: list[str] = []
        readers: dict[str, Callable[[], str]] = {
            "'": self._single_quoted, '"': self._double_quoted, "\\": self._escaped, "$": self._dollar,
        }  # fmt: skip
        while self._at < len(self._text):
            character = self._text[self._at]
            redirecting = character == "&" and self._text[self._at - 1] in "<>"
            if character in " \t" or (character in _ENDS and not redirecting):
                break
            if character in readers:
                parts.append(readers[character]())
            else:
                parts.append(character)
                self._at += 1
        return "".join(parts)

    def _single_quoted(self) -> str:
        end = self._text.find("'", self._at + 1)
        if end < 0:
            raise InputError(f"unbalanced quote: no ' closes the one at character {self._at + 1}")
        inner = self._text[self._at + 1 : end]
        self._at = end + 1
        return inner

    def _double_quoted(self) -> str:
        begin, parts = self._at, []
        self._at += 1
        while self._at < len(self._text) and self._text[self._at] != '"':
            character = self._text[self._at]
            if character == "$":
                parts.append(self._dollar())
                continue
            if character == "\\" and self._text[self._at + 1 : self._at + 2] in ("$", "`", '"', "\\"):
                self._at += 1
            parts.append(self._text[self._at])
            self._at += 1
        if self._at >= len(self._text):
            raise InputError(f'unbalanced quote: no " closes the one at character {begin + 1}')
        self._at += 1
        return "".join(parts)

    def _escaped(self) -> str:
        escaped = self._text[self._at + 1 : self._at + 2]
        self._at += 1 + len(escaped)
        return escaped

    def _dollar(self) -> str:
        """A variable's value where the text sets it; a command substitution, as one piece, as it is written."""
        begin = self._at
        if self._text.startswith("$(", begin):
            depth, self._at = 1, begin + 2
            while depth and self._at < len(self._text):
                depth += {"(": 1, ")": -1}.get(self._text[self._at], 0)
                self._at += 1
            return self._text[begin : self._at]
        match = _VARIABLE.match(self._text, begin)
        if match is None:
            self._at += 1
            return "$"
        self._at = match.end()
        name = match.group(1) or match.group(2)
        return self.variables.get(name, match.group(0) if match.group(3) is None else match.group(3))
