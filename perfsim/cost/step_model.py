"""The cost model compiled for the event loop: plain floats, a microsecond per step, exact multi-step jumps.

A step's time splits by what drives it. Whatever follows the number of new tokens or of sampled sequences is tabulated
once with the array formulas; attention follows a few sums over the batch and is evaluated in closed form. During a run
of decode steps with a fixed batch only the attended context grows, linearly, and decode attention is piecewise linear
in it, so the step time is piecewise affine in the step index and `plain_run` can say how far one piece reaches.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np

from perfsim.cost.collective import collective_estimate
from perfsim.cost.launches import host_terms, launch_seconds
from perfsim.cost.roofline import op_estimate
from perfsim.cost.step import PLAIN
from perfsim.cost.terms import (
    AdapterTerm,
    DecodeTerm,
    LinearTerm,
    PrefillTerm,
    adapter_terms,
    blend,
    decode_terms,
    linear_terms,
    prefill_terms,
)
from perfsim.cost.topology import Fabric, fabric
from perfsim.ops.lora import lora_ops
from perfsim.ops.op import Collective, Driver, Num, Op
from perfsim.ops.speculation import lower_with_drafts
from perfsim.ops.step import StepShape, attention_spans
from perfsim.spec.calibration import Calibration
from perfsim.spec.cluster import Cluster
from perfsim.spec.hardware import Node
from perfsim.spec.model import ModelArch
from perfsim.spec.policy import ServingPolicy

NO_LORA = (0, 0)
EQUAL = (0, 0)  # longest contexts where all are equal


class DecodeRun(NamedTuple):
    """`max_steps` equal-batch decode steps; step i lasts first_s + i * slope_s."""

    max_steps: int
    first_s: float
    slope_s: float


PlainRun = tuple[int, float, float]  # a DecodeRun without names, which is made and taken apart twice as fast


class StepModel(Protocol):
    """What a serving engine asks of a cost model; tuples are aligned with the model's attention spans.

    `lora` is (tokens with an adapter, distinct adapters), `longest` are the longest contexts of a decode and of a
    prompt chunk, 0 where all are equal.
    """

    def step_seconds(
        self, tokens: int, logits: int, decodes: int, context: tuple[int, ...],
        prefill_tokens: int, pairs: tuple[int, ...], prefill_context: tuple[int, ...], lora: tuple[int, int] = NO_LORA,
        longest: tuple[int, int] = EQUAL,
    ) -> float:  # fmt: skip
        """Duration of one step."""

    def plain_run(
        self, decodes: int, context: tuple[int, ...], growth: tuple[int, ...], limit: int,
        lora: tuple[int, int] = NO_LORA, longest: int = 0,
    ) -> PlainRun:  # fmt: skip
        """The longest affine run of at most `limit` decode-only steps; `context` grows by `growth` per step."""


@dataclass(frozen=True, slots=True)
class CompiledSteps:
    """A StepModel of tables and coefficients; see `compile_steps`.

    `prompt_s` is `token_s` of steps with prompts, which some exchanges of experts tell apart. `host_s` are seconds of
    the scheduler by tokens, `exposed_s` those of the host that the GPU waits for by logits, and `decode_s` by number of
    decodes what a step of them takes besides attention and states: on the GPU, `host_s` and `exposed_s`.
    """

    token_s: list[float]
    prompt_s: list[float]
    logit_s: list[float]
    decode_s: list[tuple[float, float, float]]
    decode: tuple[DecodeTerm, ...]
    prefill: tuple[PrefillTerm, ...]
    expansion: tuple[LinearTerm, ...]
    decode_state: tuple[LinearTerm, ...]
    prefill_state: tuple[LinearTerm, ...]
    host_s: list[float]
    exposed_s: list[float]
    async_scheduling: bool
    group_s: list[float]
    sequence_s: list[float]
    queries: int
    adapters: tuple[AdapterTerm, ...] = ()

    def step_seconds(
        self, tokens: int, logits: int, decodes: int, context: tuple[int, ...],
        prefill_tokens: int, pairs: tuple[int, ...], prefill_context: tuple[int, ...], lora: tuple[int, int] = NO_LORA,
        longest: tuple[int, int] = EQUAL,
    ) -> float:  # fmt: skip
        gpu = (self.prompt_s if prefill_tokens else self.token_s)[tokens]
        gpu += self.logit_s[logits + tokens - decodes - prefill_tokens]
        if self.sequence_s:
            gpu += self.sequence_s[logits]
        chunks = logits - decodes if logits > decodes else 1
        of_decode, of_prompt = longest
        if decodes:
            for term in self.decode:
                size, x, y, slopes, wait = term.curves[decodes]
                count, span = term.count, term.span
                attended = context[span] if span >= 0 else blend(term.mix, context)
                mean = attended / size
                piece = bisect_right(x, mean) - 1  # `locate` without a call, as in `plain_run`
                alone = count * (term.launch + size * (y[piece] + slopes[piece] * (mean - x[piece])))
                alone += term.ramp_s if attended >= term.full else count * term.ramp.locate(attended)[0]
                if of_decode > mean:
                    alone += wait * (of_decode - mean)
                if prefill_tokens:
                    alone = term.beside(alone, size, attended, prefill_tokens, pairs, prefill_context, chunks, longest)
                gpu += alone
            for state in self.decode_state:
                gpu += state.seconds(decodes)
        if prefill_tokens:
            for chunk in self.prefill:
                gpu += chunk.seconds(prefill_tokens, pairs, prefill_context, chunks, of_prompt)
            for state in self.prefill_state:
                gpu += state.seconds(prefill_tokens)
        if lora[1]:
            gpu += self.adapter_seconds(lora)
        for expansion in self.expansion:
            gpu += expansion.seconds(blend(expansion.mix, prefill_context) + decodes * self.queries)
        host = self.host_s[tokens]
        if self.async_scheduling:
            return self.exposed_s[logits] + (gpu if gpu > host else host)
        return self.exposed_s[logits] + (gpu + host)

    def on_gpu(self) -> CompiledSteps:
        """The same for a host that takes no time."""
        idle, unexposed = [0.0] * len(self.host_s), [0.0] * len(self.exposed_s)
        decode_s = [(gpu, 0.0, 0.0) for gpu, _, _ in self.decode_s]
        return replace(self, host_s=idle, exposed_s=unexposed, decode_s=decode_s, async_scheduling=True)

    def adapter_seconds(self, lora: tuple[int, int]) -> float:
        """Seconds of the kernels of `lora`: (tokens with an adapter, distinct adapters)."""
        return sum(term.seconds(*lora) for term in self.adapters)

    def host_seconds(self, tokens: int) -> float:
        """Seconds of the scheduler for one step."""
        return self.host_s[tokens]

    def exposed_seconds(self, logits: int) -> float:
        """Seconds of the host that the GPU waits for in one step."""
        return self.exposed_s[logits]

    def decode_run(
        self, decodes: int, context: tuple[int, ...], growth: tuple[int, ...], limit: int,
        lora: tuple[int, int] = NO_LORA, longest: int = 0,
    ) -> DecodeRun:  # fmt: skip
        """`plain_run` with names."""
        return DecodeRun(*self.plain_run(decodes, context, growth, limit, lora, longest))

    def plain_run(
        self, decodes: int, context: tuple[int, ...], growth: tuple[int, ...], limit: int,
        lora: tuple[int, int] = NO_LORA, longest: int = 0,
    ) -> PlainRun:  # fmt: skip
        gpu, host, exposed = self.decode_s[decodes]
        slope_s = 0.0
        attended: float
        grows: float
        for term in self.decode:
            count, span = term.count, term.span
            if span >= 0:
                attended, grows = context[span], growth[span]
            else:
                attended, grows = blend(term.mix, context), blend(term.mix, growth)
            size, x, y, slopes, wait = term.curves[decodes]
            mean = attended / size
            after = bisect_right(x, mean)
            piece = after - 1
            slope = slopes[piece]
            gpu += count * (term.launch + size * (y[piece] + slope * (mean - x[piece])))
            slope_s += count * slope * grows
            if longest > mean:  # both grow by one per step
                gpu += wait * (longest - mean)
            left = x[after] * size - attended
            if attended >= term.full:
                gpu += term.ramp_s
            else:
                value, slope, knot = term.ramp.locate(attended)
                gpu += count * value
                slope_s += count * slope * grows
                left = min(left, knot - attended)
            if left < grows * limit:
                limit = max(1, int(left / grows) + 1)
        for state in self.decode_state:
            gpu += state.seconds(decodes)
        for expansion in self.expansion:
            gpu += expansion.seconds(decodes)
        if lora[1]:
            gpu += self.adapter_seconds(lora)
        if self.async_scheduling and gpu >= host:  # the usual case of `behind_host`
            return limit, exposed + gpu, slope_s
        return self.behind_host(limit, gpu, slope_s, host, exposed)

    def behind_host(self, limit: int, gpu: float, slope_s: float, host: float, exposed: float) -> DecodeRun:
        """A run on the GPU with the scheduler's time: hidden behind it under async scheduling, in front of it else.

        The GPU waits for the `exposed` seconds either way.
        """
        if not self.async_scheduling:
            return DecodeRun(limit, exposed + gpu + host, slope_s)
        if gpu >= host:
            return DecodeRun(limit, exposed + gpu, slope_s)
        if slope_s > 0.0 and (host - gpu) < slope_s * limit:  # the GPU overtakes the scheduler within this run
            limit = min(limit, int((host - gpu) / slope_s) + 1)
        return DecodeRun(limit, exposed + host, 0.0)


def compile_steps(
    *, model: ModelArch, node: Node, tp: int, dp: int = 1, ep: int = 1, pp: int = 1, calibration: Calibration,
    max_num_batched_tokens: int, max_num_seqs: int, async_scheduling: bool, cluster: Cluster | None = None,
    policy: ServingPolicy = PLAIN,
) -> CompiledSteps:  # fmt: skip
    """Tabulate and extract coefficients from the array formulas; `step_estimate` on the same shape gives equal times.

    Tables cover 0..max_num_batched_tokens tokens and 0..max_num_seqs sampled sequences, and the tokens of all `dp`
    ranks together. `policy` says how K/V are stored and whether sequences bring drafts; steps are then priced singly.
    """
    engine, device, links = calibration.engine, calibration.device, fabric(node, cluster)
    passes, kernels = engine.sampler(policy.sampling)
    backend = policy.all2all_backend or engine.all2all_backend

    def lowered(step: StepShape) -> list[Op | Collective]:
        return lower_with_drafts(
            model, step, speculative=policy.speculative, tp=tp, dp=dp, ep=ep, pp=pp,
            expert_popularity=engine.expert_popularity, sampling_passes=passes, sampling_kernels=kernels,
            kv_cache_dtype=policy.kv_cache_dtype, all2all_backend=backend,
        )  # fmt: skip

    def work(step: StepShape, driver: Driver) -> list[Num]:
        """Seconds of every operator and collective that follows `driver`."""
        return [_seconds(item, node, links, calibration) for item in lowered(step) if item.driver == driver]

    tokens, queries = np.arange(max_num_batched_tokens + 1, dtype=np.float64), policy.queries
    logits = np.arange(min(max_num_seqs * queries, max_num_batched_tokens) + 1, dtype=np.float64)
    without = _shape(model, tokens=tokens)
    token_s, logit_s = _total(work(without, "tokens")), _total(work(_shape(model, logits=logits), "logits"))
    # A step with a prompt may exchange its tokens by other kernels.
    prompt_s = _total(work(replace(without, prefill_tokens=1.0), "tokens")) if backend == "deepep_auto" else token_s
    together = np.arange(dp * max_num_batched_tokens + 1 if dp > 1 else 0, dtype=np.float64)
    shared = work(_shape(model, group=together, queries=queries), "group") if dp > 1 else [together]

    def unit(units: float, queries: int) -> list[Op]:
        return [item for item in lowered(_unit(model, units, queries)) if isinstance(item, Op)]

    one, two = unit(1.0, queries), unit(2.0, queries)
    launch = launch_seconds(model, engine, tp=tp, dp=dp, ep=ep, pp=pp, policy=policy) / pp  # a stage launches its own
    exposed, scheduler, hides = host_terms(engine, launch=launch, asynchronous=async_scheduling)
    host_s, exposed_s = scheduler + engine.token_host * tokens, exposed + engine.sequence_host * logits
    return CompiledSteps(
        token_s, prompt_s, logit_s, _of_decodes(token_s, logit_s, host_s.tolist(), exposed_s.tolist()),
        decode_terms(one, node, device), prefill_terms(one, node, device),
        linear_terms(unit(1.0, 1), unit(2.0, 1), "expansion", node, device),
        linear_terms(one, two, "decodes", node, device), linear_terms(one, two, "prefill", node, device),
        host_s.tolist(), exposed_s.tolist(), hides,
        _total(shared), _total(work(_shape(model, logits=logits[: max_num_seqs + 1]), "sequences")), queries,
        adapter_terms(_adapters(model, policy, tp, tokens=1), _adapters(model, policy, tp, adapters=1), node, device),
    )  # fmt: skip


def _of_decodes(
    token_s: list[float], logit_s: list[float], host_s: list[float], exposed_s: list[float]
) -> list[tuple[float, float, float]]:
    """`CompiledSteps.decode_s`: every decode brings a token and is sampled."""
    rows = zip(token_s, logit_s, host_s, exposed_s, strict=False)  # as many as all have
    return [(token + logit, host, exposed) for token, logit, host, exposed in rows]


def _total(seconds: Sequence[Num]) -> list[float]:
    """Sums over operators, by size of the work; empty without operators."""
    total: list[float] = np.sum(np.stack(seconds), axis=0).tolist() if seconds else []
    return total


def _seconds(item: Op | Collective, node: Node, links: Fabric, calibration: Calibration) -> Num:
    if isinstance(item, Op):
        return op_estimate(item, node.accelerator, calibration.device, calibration.power).seconds
    return collective_estimate(item, links, calibration.device).seconds


def _adapters(
    model: ModelArch, policy: ServingPolicy, tp: int, *, tokens: float = 0.0, adapters: float = 0.0
) -> list[Op]:  # fmt: skip
    """What LoRA adapters add to a step: kernels that follow the tokens, or those that follow distinct adapters."""
    step = replace(_shape(model), lora_tokens=tokens, lora_adapters=adapters)
    return list(lora_ops(model, step, policy.lora, tp=tp))


def _shape(
    model: ModelArch, *, tokens: Num = 0.0, logits: Num = 0.0, group: Num | None = None, queries: int = 1
) -> StepShape:
    """A step without attention."""
    nothing = (0.0,) * len(attention_spans(model))
    return StepShape(tokens, logits, 0.0, nothing, 0.0, nothing, nothing, group, queries)


def _unit(model: ModelArch, units: float, queries: int) -> StepShape:
    """One attended entry, `units` decodes of `queries` tokens, and `units` new prompt tokens."""
    ones = (1.0,) * len(attention_spans(model))
    return StepShape(0.0, 0.0, units, ones, units, ones, (0.0,) * len(ones), None, queries)
