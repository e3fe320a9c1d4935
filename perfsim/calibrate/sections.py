"""Exchanges the sections of one kind in a file of operator curves, and leaves every other line as it is."""

from __future__ import annotations

BACKENDS = "backends:"


def with_kind(text: str, made: str, kind: str) -> str:
    """`text` with the sections `kind` of `made` instead of its own, and its line of `left_out`."""
    head, body, tail = _parts(text)
    new_head, new_body, _ = _parts(made)
    mark = f"  {kind}: "
    left = [line for line in new_head if line.startswith(mark)]
    at = head.index("left_out:") + 1
    head = [*head[:at], *left, *(line for line in head[at:] if not line.startswith(mark))]
    lines = [*head, BACKENDS]
    for backend in sorted(body.keys() | new_body.keys()):
        kinds = {name: block for name, block in body.get(backend, {}).items() if name != kind}
        kinds |= {name: block for name, block in new_body.get(backend, {}).items() if name == kind}
        if kinds:
            lines.append(f"  {backend}:")
        for name in sorted(kinds):
            lines += [f"    {name}:", *kinds[name]]
    return "\n".join([*lines, *tail]) + "\n"


def _parts(text: str) -> tuple[list[str], dict[str, dict[str, list[str]]], list[str]]:
    """(lines before the backends, lines of each kind of each backend, lines after them)."""
    lines = text.splitlines()
    at = lines.index(BACKENDS)
    end = next((place for place in range(at + 1, len(lines)) if not lines[place].startswith(" ")), len(lines))
    body: dict[str, dict[str, list[str]]] = {}
    kinds: dict[str, list[str]] = {}
    block: list[str] = []
    for line in lines[at + 1 : end]:
        depth = len(line) - len(line.lstrip())
        if depth == 2:
            kinds = body.setdefault(line.strip().rstrip(":"), {})
        elif depth == 4:
            block = kinds.setdefault(line.strip().rstrip(":"), [])
        else:
            block.append(line)
    return lines[:at], body, lines[end:]
