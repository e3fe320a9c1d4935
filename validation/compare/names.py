"""Which descriptor a table's word for a device or a model means: by what its parts are, not by how they are written.

`H100-SXM-80GB`, `h100_80gb_sxm` and `NVIDIA H100 80GB SXM5` are one device; `org/Name-Instruct-FP8` has the shapes of
`Name`. Words that change nothing are left out; a name that then fits more than one device fits none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache

from validation.compare.formats import ending

# Makers and brands, and words that every device of that name shares.
_BRANDS = frozenset(
    {"nvidia", "amd", "intel", "google", "instinct", "geforce", "tesla", "gpu", "hbm2e", "hbm3", "hbm3e"}
)
# Checkpoints that were trained further, or converted, with the shapes of the model that they began as; 2507 and 0528
# are their months.
_VARIANTS = frozenset({"instruct", "base", "chat", "it", "hf", "meta", "bf16", "fp16"})
_MONTH = re.compile(r"(?:2[3-9]|0[1-9]|1[0-2])\d{2}")
_SOCKET = re.compile(r"sxm\d")


def device_named(name: str, known: Mapping[str, str]) -> str | None:
    """The one target of the names in `known` that have the words of `name` in any order; None when there is none.

    Words may be joined, too: RTX4090.
    """
    found = _targets(tuple(sorted(known.items())))
    return found.get(_words(name)) or found.get(_joined(name))


@cache
def _targets(known: tuple[tuple[str, str], ...]) -> dict[frozenset[str] | str, str]:
    found: dict[frozenset[str] | str, set[str]] = {}
    for name, target in known:
        found.setdefault(_words(name), set()).add(target)
        found.setdefault(_joined(name), set()).add(target)
    return {key: next(iter(targets)) for key, targets in found.items() if len(targets) == 1}


def _words(name: str) -> frozenset[str]:
    words = (word for word in re.split(r"[^a-z0-9]+", name.lower()) if word and word not in _BRANDS)
    return frozenset("sxm" if _SOCKET.fullmatch(word) else word for word in words)


def _joined(name: str) -> str:
    return "".join(re.split(r"[^a-z0-9]+", name.lower()))


def base_of(name: str) -> str:
    """What a checkpoint's name says of its shapes, in lower case.

    >>> base_of("RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w4a16"), base_of("Qwen--Qwen3-235B-A22B")
    ('llama-3.1-8b', 'qwen3-235b-a22b')
    """
    bare = ending(re.split(r"/|--", name)[-1])[0].lower().replace("_", ".")
    return "-".join(word for word in re.split(r"[-\s]+", bare) if word not in _VARIANTS and not _MONTH.fullmatch(word))


def model_named(name: str, known: Iterable[str]) -> str | None:
    """The one of the catalogue's names `known` with the shapes that `name` says; None when there is none.

    One whose name says the same of its weights comes first, then one that is not quantised: its formats are those that
    the table or the name says. Of equals, one with its organisation: others may be abridged.
    """
    label = ending(name)[1]
    same = sorted((other for other in known if base_of(other) == base_of(name)), key=lambda one: ("--" not in one, one))
    alike = [other for wanted in (label, None) for other in same if ending(other)[1] == wanted]
    return next(iter(alike), None)
