"""What is asked of the system: a trace to replay, or arrivals, lengths and conversations to draw."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from perfsim.spec.arrivals import (
    Arrivals,
    BurstyArrivals,
    ClosedLoop,
    ConstantArrivals,
    CurveArrivals,
    DiurnalArrivals,
    GammaArrivals,
    PoissonArrivals,
    QuantisedArrivals,
    StagedArrivals,
)
from perfsim.spec.base import Seconds, Spec
from perfsim.spec.distributions import (
    Duration,
    FixedLength,
    FixedTime,
    GeometricLength,
    Length,
    LognormalLength,
    Turns,
    UniformLength,
)

__all__ = [
    "AgentsWorkload", "Arrivals", "BurstyArrivals", "ClosedLoop", "ConstantArrivals", "ConversationWorkload",
    "CurveArrivals", "DiurnalArrivals", "Duration", "FixedLength", "GammaArrivals", "GeometricLength", "Length",
    "LognormalLength", "PoissonArrivals", "QuantisedArrivals", "RagWorkload", "SessionsWorkload", "SharedPrefix",
    "StagedArrivals", "SyntheticWorkload", "TraceWorkload", "Turns", "UniformLength", "Workload",
]  # fmt: skip

Count = Annotated[int, Field(gt=0, le=10**9)]
# A client that has waited so long for the last token of its answer goes away, and the engine drops its request.
Timeout = Annotated[Seconds, Field(gt=0, le=1e9)] | None


class SharedPrefix(Spec):
    """Prompts begin with one of `num_prefixes` common prefixes of `tokens` tokens, chosen in rotation or at random."""

    num_prefixes: int = Field(gt=0, le=10**7)
    tokens: int = Field(gt=0, le=10**8)
    order: Literal["rotation", "random"] = "rotation"


class TraceWorkload(Spec):
    """Replay of recorded requests from `trace`: a packaged name, a CSV, JSONL or Parquet file, or a benchmark's JSON.

    `vllm bench serve --save-detailed` and GuideLLM save JSON; of a GuideLLM report with several benchmarks, `benchmark`
    says which one, from 0. The requests.parquet of a run is a trace as well, without what its prompts shared.
    `time_scale` stretches the arrival times (2: half the rate), `num_requests` keeps the first n. `arrivals` replaces
    the recorded times. `content_hash` (SHA-256 of the file) is filled in by the loader, so that the scenario hash
    covers what is in the file. Clients give up `timeout` after sending.
    """

    kind: Literal["trace"] = "trace"
    trace: str
    time_scale: float = Field(default=1.0, gt=0, le=1e6)
    num_requests: Count | None = None
    arrivals: Arrivals | None = None
    benchmark: int | None = Field(default=None, ge=0)
    timeout: Timeout = None
    content_hash: str | None = None

    @model_validator(mode="after")
    def _one_clock(self) -> Self:
        if self.arrivals is not None and self.time_scale != 1.0:
            raise ValueError("time_scale stretches the recorded times, which arrivals replaces; set one of the two")
        return self


class SyntheticWorkload(Spec):
    """`num_requests` requests drawn from an arrival process and two length distributions.

    `prompt` counts all prompt tokens, a shared prefix included (longer of the two wins). Clients give up `timeout`
    after sending.
    """

    kind: Literal["synthetic"] = "synthetic"
    num_requests: Count
    arrivals: Arrivals
    prompt: Length
    output: Length
    shared_prefix: SharedPrefix | None = None
    timeout: Timeout = None


class SessionsWorkload(Spec):
    """`num_sessions` conversations of several turns: every turn's prompt is all that was said before and `input` more.

    A session arrives by `arrivals` (in a closed loop, when the one before it of the same user has ended), sends a turn
    and, `think_time` after its answer, the next. What was said before is found in the prefix cache as far as it is
    still there, generated tokens included. A turn that would not fit into `max_context` tokens, or into the engine's
    max_model_len, is not sent and ends the session. `first_input` replaces `input` in the first turn.
    """

    kind: Literal["sessions"] = "sessions"
    num_sessions: Count
    arrivals: Arrivals
    turns: Turns
    input: Length
    first_input: Length | None = None
    output: Length
    think_time: Duration = FixedTime(seconds=0.0)
    system_prompt: SharedPrefix | None = None
    max_context: int | None = Field(default=None, gt=1, le=10**8)


class AgentsWorkload(Spec):
    """`num_sessions` tasks, each worked on by an agent that calls the model, waits for a tool and calls again.

    A call's prompt is the `task`, and everything generated and returned by tools so far: each tool call takes
    `tool_latency` and appends `tool_output` tokens. `calls` counts the calls of the model, so there is one tool call
    less. The rest is as in `SessionsWorkload`.
    """

    kind: Literal["agents"] = "agents"
    num_sessions: Count
    arrivals: Arrivals
    calls: Turns
    task: Length
    tool_output: Length
    output: Length
    tool_latency: Duration
    system_prompt: SharedPrefix | None = None
    max_context: int | None = Field(default=None, gt=1, le=10**8)


class RagWorkload(Spec):
    """`num_requests` questions over retrieved documents: system prompt, `documents` documents, `question`.

    The documents are different ones of a corpus of `corpus_documents`, drawn with a Zipf law of exponent `popularity`
    (0: uniform); each has a length of its own, drawn once. Prompts share their beginning as far as their leading
    documents agree, so `order` matters: as retrieved, or the most popular first.
    """

    kind: Literal["rag"] = "rag"
    num_requests: Count
    arrivals: Arrivals
    corpus_documents: int = Field(gt=0, le=10**6)
    popularity: float = Field(default=1.0, ge=0, le=5)
    document: Length
    documents: int = Field(gt=0, le=1000)
    order: Literal["retrieved", "popularity"] = "retrieved"
    question: Length
    output: Length
    system_prompt: SharedPrefix | None = None

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.documents > self.corpus_documents:
            raise ValueError(f"documents ({self.documents}) must be at most corpus_documents ({self.corpus_documents})")
        return self


ConversationWorkload = SessionsWorkload | AgentsWorkload
Workload = Annotated[
    TraceWorkload | SyntheticWorkload | SessionsWorkload | AgentsWorkload | RagWorkload, Field(discriminator="kind")
]
