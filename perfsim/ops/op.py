"""Units of work: an operator on one GPU, or a message exchange within a group of GPUs.

Every quantity is a float or a NumPy array of floats: the same lowering explains one step and millions of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Num = float | NDArray[np.float64]

Driver = Literal["tokens", "logits", "sequences", "attention", "expansion", "decodes", "prefill", "adapters", "group"]
OpKind = Literal[
    "gemm", "lm_head", "moe", "prefill_attention", "decode_attention", "recurrence", "elementwise", "sampling"
]
CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv", "broadcast"]


ExchangeKernels = Literal["low_latency", "normal"]
Direction = Literal["dispatch", "combine"]


class Routed(NamedTuple):
    """What kernels made for experts exchange: `tokens` of one GPU, each of `row_bytes`, for `picks` of `experts`."""

    kernels: ExchangeKernels
    direction: Direction
    tokens: Num
    row_bytes: float
    experts: int
    picks: int


class Beside(NamedTuple):
    """Prompt chunks in the step of a decode kernel: their new tokens, pairs and K/V entries, the `longest` context.

    `pair_flops` are those of one of their pairs.
    """

    tokens: Num
    pairs: Num
    entries: Num
    longest: Num
    pair_flops: float


@dataclass(frozen=True, slots=True)
class Op:
    """`count` equal kernels of one GPU: FLOPs and bytes are of one of them, after sharding.

    `driver` names the sum over the batch that its size follows (`expansion`: the K/V entries that MLA expands, `group`:
    the tokens of all data-parallel ranks; `logits` counts the rows that are sampled, `sequences` the sequences that
    they belong to, `adapters` tokens with an adapter and distinct adapters). `part` names the component of the
    breakdown ("": as its kind says). `dtype` is the arithmetic of the matrix units; `active` is 0 where the kernel is
    not launched at all. `mix` are the (index of a span, entries per token) whose weighted sum an attention kernel
    attends. Attention also says how its work splits: over `sequences` of mean `context` up to `longest` (of prefill the
    last alone), with `sequence_*_bytes` each (prefill: per new token), `entry_bytes` per entry read, and `pair_flops`
    and `pair_bytes` per attended pair.

    Fitted curves also need: `rows` (of a product; of prefill attention, new tokens) and the `depth` k of a product;
    `heads` of queries; `beside`, the prompt chunks of the step (of decode attention only); `tiles`, what one sequence
    is split into (K/V heads), or the experts that are picked, each row of which is `pair_flops` and enters with `depth`
    bytes; `format`, how the weights or the cache are stored ("": no curve was fitted to such an op); `limit`, the
    most tokens that attention reaches (0: contexts are taken at their mean).
    """

    kind: OpKind
    name: str
    count: int
    flops: Num
    read_bytes: Num
    write_bytes: Num
    dtype: str
    driver: Driver = "tokens"
    active: Num = 1.0
    sequences: Num = 0.0
    context: Num = 0.0
    longest: Num = 0.0
    limit: float = 0.0
    mix: tuple[tuple[int, float], ...] = ()
    sequence_read_bytes: float = 0.0
    sequence_write_bytes: float = 0.0
    entry_bytes: float = 0.0
    pair_bytes: float = 0.0
    pair_flops: float = 0.0
    part: str = ""
    rows: Num = 0.0
    depth: float = 0.0
    heads: float = 0.0
    tiles: Num = 0.0
    beside: Beside | None = None
    format: str = ""

    @property
    def unlimited(self) -> bool:
        """Whether attention reaches all tokens."""
        return self.limit == np.inf


@dataclass(frozen=True, slots=True)
class Collective:
    """`count` equal exchanges among `group` GPUs whose ranks are `stride` apart; `active` as for an Op.

    `bytes` is per GPU: the vector that is reduced, reduced and scattered, or broadcast; what each GPU contributes to an
    all-gather; all that a GPU sends in an all-to-all if peers get equal parts, its own part included; the message of
    one send_recv, in which each of `group` pipeline stages sends to the next. Ranks fill a node before the next one.
    `across_bytes` replaces, for an all-to-all, what a GPU sends out of its node: expert dispatch may send a token once
    per node and copy it there. `routed` says which tokens an all-to-all by kernels made for experts moves.
    """

    kind: CollectiveKind
    name: str
    count: int
    bytes: Num
    group: int
    driver: Driver = "tokens"
    active: Num = 1.0
    stride: int = 1
    across_bytes: Num | None = None
    routed: Routed | None = None
    part: str = ""
