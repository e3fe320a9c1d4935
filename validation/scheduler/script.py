"""The scripted cases: what is sent, and before which step, under which scheduler limits.

A request is written `(step, prompt, output[, priority])`. It arrives before step `step`, counted over steps that run
something. Its prompt is pieces of text joined by "+", each a name and a length in tokens ("p128+u40"): equal names
stand for equal text, so prompts that begin with the same pieces share a prefix. Blocks hold 32 tokens: vLLM's attention
for CPUs takes multiples of 32 only, and larger blocks would make small pools coarse.

The piece "@3" stands for all that request 3 was asked and has said, as in the next turn of a conversation; request 3
has to be finished by then.

The cases random-* are scripts number 0 to 15 of a generator, none left out: four kinds of prompts, the last of them
always one of two equal long texts in a pool that hardly holds them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BLOCK = 32
DEFAULTS: dict[str, Any] = {
    "max_num_batched_tokens": 128,
    "max_num_seqs": 8,
    "max_model_len": 512,
    "block_size": BLOCK,
    "total_blocks": 63,
    "priority": False,
    "chunked_prefill": True,
    "prefix_caching": True,
    "long_prefill_token_threshold": 0,
    "async_scheduling": False,
    "reserve_full_isl": True,
    "watermark_blocks": 0,
}
"""The fields of `perfsim.serving.engine.EngineConfig` that a case may set; counts of tokens and blocks."""

Row = tuple[int, str, int] | tuple[int, str, int, int]


@dataclass(frozen=True, slots=True)
class Case:
    """One script: its name, the requests in order of arrival, and what differs from `DEFAULTS`."""

    name: str
    requests: tuple[Row, ...]
    config: dict[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """All limits; the longest sequence is never longer than the pool."""
        settings = DEFAULTS | self.config
        settings["max_model_len"] = min(settings["max_model_len"], settings["total_blocks"] * BLOCK)
        return settings


def prompt_tokens(text: str, said: Mapping[int, list[int]]) -> list[int]:
    """Token ids (3..502) of a prompt written as pieces; `said` holds the conversations that "@" may refer to.

    The same name always gives the same ids. Raises KeyError when a conversation is not there.
    """
    tokens: list[int] = []
    for piece in text.split("+"):
        if piece.startswith("@"):
            tokens.extend(said[int(piece[1:])])
            continue
        name = piece.rstrip("0123456789")
        ids = random.Random(name)  # noqa: S311 - text, not secrets
        tokens.extend(ids.randrange(3, 503) for _ in range(int(piece[len(name) :])))
    return tokens


def continued(case: Case) -> set[int]:
    """The requests that a later prompt goes on from."""
    return {int(piece[1:]) for row in case.requests for piece in row[1].split("+") if piece.startswith("@")}


def block_ids(prompts: list[list[int]]) -> list[list[int]]:
    """For each text one small number per full block; equal numbers mean equal tokens up to the block's end."""
    known: dict[tuple[int, ...], int] = {}
    return [
        [known.setdefault(tuple(tokens[:end]), len(known)) for end in range(BLOCK, len(tokens) + 1, BLOCK)]
        for tokens in prompts
    ]


def _mix(seed: int, count: int, *, longest: int, outputs: int, every: int, priorities: int = 1) -> tuple[Row, ...]:
    """A random script: some prompts begin with one of three shared texts, arrivals are `every` steps apart at most."""
    draw = random.Random(seed)  # noqa: S311 - a script, not secrets
    rows: list[Row] = []
    step = 0
    for index in range(count):
        shared = draw.choice(["", "", "s", "t", "u"])
        length = draw.randint(1, longest)
        head = draw.randint(1, length)
        text = f"{shared}{head}+{_name(index)}{length}" if shared else f"{_name(index)}{length}"
        rows.append((step, text, draw.randint(1, outputs), draw.randrange(priorities)))
        step += draw.randint(0, every)
    return tuple(rows)


def _random(seed: int) -> Case:
    """A random script with random limits and a small pool."""
    draw = random.Random(seed)  # noqa: S311 - a script, not secrets
    kind = ("own", "equal", "shared", "two-long")[seed % 4]
    lagging = draw.random() < 0.5
    pool = draw.choice([8, 9, 10, 12] if kind == "two-long" else [9, 12, 16, 20, 30])
    budget = draw.choice([16, 33, 64, 200])
    limits = {
        "async_scheduling": lagging, "total_blocks": pool, "max_num_batched_tokens": budget,
        "max_num_seqs": min(draw.choice([2, 4, 8, 12]), budget), "priority": draw.random() < 0.35,
        "long_prefill_token_threshold": draw.choice([0, 0, 20, 50]), "reserve_full_isl": draw.random() < 0.5,
        "watermark_blocks": draw.choice([0, 0, 1, 2]),
    }  # fmt: skip
    longest = min(200, (pool - 2) * BLOCK - 70)
    rows: list[Row] = []
    step = 0
    for index in range(draw.randint(8, 14)):
        length = draw.randint(1, longest)
        text = f"{_name(index)}{length}"
        if kind == "equal":
            text = f"{draw.choice('pq')}{min(longest, draw.choice([64, 96, 100, longest]))}"
        elif kind == "shared":
            text = f"{draw.choice('st')}{draw.choice([32, 40, 64, 96])}+{_name(index)}{max(1, length // 2)}"
        elif kind == "two-long":
            text = f"{draw.choice('pq')}{longest}"
        rows.append((step, text, draw.randint(1, 50), draw.randrange(3) if limits["priority"] else 0))
        step += draw.randint(0, 5)
        step += lagging and step == 1  # what arrives before an async engine's second step is not defined
    return Case(f"random-{seed:02}-{kind}", tuple(rows), limits)


def _name(index: int) -> str:
    return "x" + chr(ord("a") + index // 26) + chr(ord("a") + index % 26)


def _at_once(count: int, length: int, output: int) -> tuple[Row, ...]:
    return tuple((0, f"{_name(index)}{length}", output) for index in range(count))


CASES: tuple[Case, ...] = (
    Case("chunked-prefill", ((0, "a300", 8), (0, "b40", 20), (3, "c200", 5))),
    Case("long-prompts", ((0, "a480", 6), (1, "b450", 6), (2, "c30", 12)), {"max_num_batched_tokens": 64}),
    Case("prefix-hits", ((0, "p128+u40", 12), (4, "p128+v50", 6), (6, "p128+w10", 4), (8, "p70+y90", 4))),
    Case("full-hit", ((0, "p128", 4), (2, "p128", 4), (5, "p96", 3), (5, "p97", 3), (6, "p128+q1", 3),
         (20, "p128", 2))),
    Case("identical-at-once", tuple((0, "p128", 6) for _ in range(6)), {"max_num_batched_tokens": 256}),
    Case("identical-in-chunks", tuple((0, "p320", 5) for _ in range(4))),
    Case("identical-staggered", tuple((step, "p320", 5) for step in range(5))),
    Case("identical-evicted", (*((0, "p100", 9) for _ in range(3)), (3, "a200", 40), (5, "p100", 3), (6, "b90", 30),
         (50, "p100", 2), (60, "c300", 2), (70, "p100", 2)), {"total_blocks": 15}),
    Case("eviction", ((0, "a160", 2), (4, "b160", 2), (8, "c160", 2), (12, "a160", 2), (16, "b160", 2),
         (20, "b160", 2)),
         {"total_blocks": 15}),
    Case("eviction-of-the-end", ((0, "a250", 3), (9, "b200", 3), (18, "a250", 3), (27, "a128+c9", 3)),
         {"total_blocks": 12}),
    Case("preemption", _at_once(4, 60, 90), {"total_blocks": 12}),
    Case("preemption-often", _at_once(7, 40, 120), {"total_blocks": 11}),
    Case("preemption-with-hits", ((0, "p96+a20", 70), (1, "p96+b20", 90), (2, "p96+c20", 80), (3, "p96+d1", 60)),
         {"total_blocks": 13}),
    Case("preemption-of-prefill", ((0, "a60", 90), (1, "b62", 90), (2, "c300", 4), (3, "d40", 40)),
         {"total_blocks": 13, "reserve_full_isl": False, "max_num_batched_tokens": 40}),
    Case("priority-admission", ((0, "a50", 9, 1), (0, "b50", 9, 2), (1, "c50", 6, 2), (1, "d50", 6, 0),
         (2, "e50", 6, 1),
         (3, "f50", 6, 0)), {"priority": True, "max_num_seqs": 2}),
    Case("priority-preemption", ((0, "a60", 60, 2), (0, "b60", 90, 1), (1, "c60", 70, 0), (4, "d60", 80, 0),
         (9, "e30", 50, 1)), {"priority": True, "total_blocks": 11}),
    Case("priority-victim-scheduled", ((0, "a62", 90, 3), (0, "b60", 90, 0), (1, "c61", 90, 1), (2, "d59", 80, 0)),
         {"priority": True, "total_blocks": 12}),
    Case("max-num-seqs", _at_once(7, 30, 9), {"max_num_seqs": 2}),
    Case("budget-edges", ((0, "a128", 3), (2, "b129", 3), (5, "c127", 3), (5, "d1", 3), (9, "e256", 3),
         (12, "f257", 3))),
    Case("budget-with-decodes", (*_at_once(6, 20, 30), (3, "a122", 3), (6, "b123", 3), (9, "c250", 3)),
         {"max_num_seqs": 9}),
    Case("tiny-budget", ((0, "a40", 12), (0, "b9", 20), (1, "c33", 5), (2, "d7", 9)),
         {"max_num_batched_tokens": 8, "max_num_seqs": 8}),
    Case("threshold", ((0, "a200", 6), (0, "b200", 6), (1, "c20", 9), (2, "d90", 4)),
         {"long_prefill_token_threshold": 48}),
    Case("threshold-alone", ((0, "a400", 4), (2, "b70", 9), (14, "c300", 3)), {"long_prefill_token_threshold": 32}),
    Case("arrivals-every-step", tuple((step, f"{_name(step)}{17 + 9 * step}", 4 + step % 5) for step in range(14))),
    Case("reserve-on", ((0, "a100", 40), (0, "b350", 9), (1, "c200", 9), (2, "d60", 9)), {"total_blocks": 14}),
    Case("reserve-off", ((0, "a100", 40), (0, "b350", 9), (1, "c200", 9), (2, "d60", 9)),
         {"total_blocks": 14, "reserve_full_isl": False}),
    Case("watermark", ((0, "a100", 60), (0, "b90", 60), (1, "c80", 60), (2, "d60", 30)),
         {"total_blocks": 14, "watermark_blocks": 2}),
    Case("one-token-outputs", ((0, "a90", 1), (0, "b60", 1), (0, "c200", 1), (1, "d20", 1), (2, "a90", 1),
         (2, "e9", 7))),
    Case("no-prefix-caching", ((0, "p128", 9), (2, "p128", 9), (3, "p200", 30), (4, "a60", 60), (5, "b60", 60)),
         {"prefix_caching": False, "total_blocks": 15}),
    Case("no-chunked-prefill", ((0, "a300", 6), (0, "b300", 6), (1, "c100", 6), (2, "d500", 6), (3, "e10", 6)),
         {"chunked_prefill": False, "max_num_batched_tokens": 512}),
    Case("idle-between", ((0, "p70", 3), (9, "p70+a40", 3), (19, "p70+a40", 3))),
    Case("mix-roomy", _mix(1, 40, longest=220, outputs=25, every=3)),
    Case("mix-tight", _mix(2, 24, longest=160, outputs=60, every=4), {"total_blocks": 16}),
    Case("mix-tight-lazy", _mix(3, 24, longest=200, outputs=50, every=4),
         {"total_blocks": 16, "reserve_full_isl": False}),
    Case("mix-priority", _mix(4, 24, longest=120, outputs=60, every=4, priorities=3),
         {"total_blocks": 16, "priority": True}),
    Case("mix-threshold", _mix(5, 30, longest=250, outputs=20, every=3),
         {"long_prefill_token_threshold": 40, "total_blocks": 30}),
    Case("async-chunked-prefill", ((0, "a300", 8), (0, "b40", 20), (3, "c200", 5)), {"async_scheduling": True}),
    Case("async-max-num-seqs", _at_once(7, 30, 9), {"async_scheduling": True, "max_num_seqs": 2}),
    Case("async-one-token-outputs", ((0, "a90", 1), (0, "b60", 1), (0, "c200", 1), (2, "a90", 1), (2, "e9", 7)),
         {"async_scheduling": True}),
    Case("async-preemption", _at_once(4, 60, 90), {"async_scheduling": True, "total_blocks": 12}),
    Case("async-prefix-hits", ((0, "p128+u40", 12), (4, "p128+v50", 6), (6, "p128+w10", 4), (8, "p70+y90", 4)),
         {"async_scheduling": True}),
    Case("async-mix-roomy", _mix(6, 30, longest=220, outputs=25, every=2), {"async_scheduling": True}),
    Case("async-mix-tight", _mix(8, 20, longest=160, outputs=50, every=3),
         {"async_scheduling": True, "total_blocks": 16}),
    Case("turns", ((0, "a70", 40), (3, "b50", 30), (45, "@0+c30", 20), (48, "@1+d40", 20), (70, "@2+e20", 30),
         (72, "@3+f9", 5))),
    Case("turns-at-block-edge", ((0, "a64", 33), (0, "b64", 32), (40, "@0+c10", 9), (40, "@1+d10", 9))),
    Case("turns-tight", ((0, "a70", 60), (2, "b50", 50), (4, "c60", 50), (6, "d40", 40), (70, "@0+e30", 20),
         (72, "@1+f40", 20), (76, "@2+g30", 30), (82, "@3+h20", 40), (125, "@4+i20", 20), (240, "@7+j9", 20)),
         {"total_blocks": 13}),
    Case("async-turns", ((0, "a70", 40), (3, "b50", 70), (48, "@0+c30", 33), (52, "d64", 60), (90, "@2+e20", 30)),
         {"async_scheduling": True, "total_blocks": 12}),
    Case("async-priority-preemption", ((0, "a60", 60, 2), (0, "b60", 90, 1), (2, "c60", 70, 0), (4, "d60", 80, 0),
         (9, "e30", 50, 1)), {"priority": True, "total_blocks": 11, "async_scheduling": True}),
    # Found by random scripts: they once showed where perfsim differed.
    Case("twin-copy-evicted", ((0, "b64", 26, 2), (2, "a100", 14, 0), (5, "b200", 58, 0), (5, "a200", 25, 1),
         (9, "a64", 1, 0),
         (14, "a96", 54, 1), (17, "b100", 14, 2), (21, "a200", 41, 0), (24, "a64", 29, 1), (24, "b64", 17, 2),
         (28, "b100", 25, 0), (30, "a200", 41, 0)),
         {"total_blocks": 12, "max_num_batched_tokens": 200, "max_num_seqs": 12, "priority": True,
          "long_prefill_token_threshold": 20, "reserve_full_isl": False}),
    Case("async-resume-at-block-edge", ((0, "a134", 35), (2, "b71", 50), (3, "c28", 17), (4, "d7", 54), (9, "e67", 52),
         (11, "f50", 11), (13, "g75", 41), (18, "h96", 6), (22, "i87", 43), (25, "j130", 16), (26, "k64", 31)),
         {"async_scheduling": True, "total_blocks": 9, "max_num_batched_tokens": 200, "max_num_seqs": 12}),
    Case("async-preemption-of-finishing", ((0, "a68", 4), (5, "b166", 14), (7, "c59", 20), (8, "d46", 10),
         (9, "e89", 24),
         (14, "f105", 54), (15, "g104", 30), (19, "h71", 58), (22, "i42", 55), (27, "j164", 8), (28, "k2", 39),
         (31, "l38", 50), (35, "m42", 13), (36, "n7", 59), (41, "o61", 29)),
         {"async_scheduling": True, "total_blocks": 20, "max_num_batched_tokens": 33, "max_num_seqs": 12,
          "long_prefill_token_threshold": 20, "reserve_full_isl": False}),
    *map(_random, range(16)),
)  # fmt: skip
