"""The cost model compiled for the event loop: plain floats, a microsecond per step, exact multi-step jumps.

A step's time splits by what drives it. Whatever follows the number of new tokens or of sampled sequences is tabulated
once with the array formulas; attention follows a few sums over the batch and is evaluated in closed form. During a run
of decode steps with a fixed batch only the attended context grows, linearly, and decode attention is piecewise linear
in it, so the step time is piecewise affine in the step index and `decode_run` can say how far one piece reaches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from perfsim.cost.collective import collective_estimate
from perfsim.cost.device import peak_flops
from perfsim.cost.piecewise import PiecewiseLinear
from perfsim.cost.roofline import decode_attention_curve, op_estimate
from perfsim.cost.topology import fabric
from perfsim.ops.op import Driver, Num, Op
from perfsim.ops.step import StepShape, attention_windows
from perfsim.ops.transformer import lower
from perfsim.spec.calibration import Calibration
from perfsim.spec.cluster import Cluster
from perfsim.spec.hardware import Node
from perfsim.spec.model import ModelArch


class DecodeRun(NamedTuple):
    """`max_steps` equal-batch decode steps; step i lasts first_s + i * slope_s."""

    max_steps: int
    first_s: float
    slope_s: float


class StepModel(Protocol):
    """What a serving engine asks of a cost model; tuples are aligned with the model's attention windows."""

    def step_seconds(
        self, tokens: int, logits: int, decodes: int, context: tuple[int, ...],
        prefill_tokens: int, pairs: tuple[int, ...], prefill_context: tuple[int, ...],
    ) -> float:  # fmt: skip
        """Duration of one step."""

    def decode_run(self, decodes: int, context: tuple[int, ...], growth: tuple[int, ...], limit: int) -> DecodeRun:
        """The longest affine run of at most `limit` decode-only steps; `context` grows by `growth` per step."""


@dataclass(frozen=True, slots=True)
class AttentionTerm:
    """Attention of all layers of one shape: decode curve, and prefill as launch + max(pairs, entries and tokens)."""

    window: int
    count: int
    launch: float
    curve: PiecewiseLinear
    prefill_launch: float
    per_pair: float
    per_entry: float
    per_token: float


@dataclass(frozen=True, slots=True)
class ExpansionTerm:
    """MLA's re-expansion of K and V: count * (launch + max(fixed + per_entry * x, compute * x))."""

    window: int
    count: int
    launch: float
    fixed: float
    per_entry: float
    compute: float

    def seconds(self, entries: float) -> float:
        return self.count * (self.launch + max(self.fixed + self.per_entry * entries, self.compute * entries))


@dataclass(frozen=True, slots=True)
class CompiledSteps:
    """A StepModel of tables and coefficients; see `compile_steps`."""

    token_s: list[float]
    logit_s: list[float]
    attention: tuple[AttentionTerm, ...]
    expansion: tuple[ExpansionTerm, ...]
    exposed: float
    schedule: float
    per_sequence: float
    per_token: float
    async_scheduling: bool
    group_s: list[float]

    def step_seconds(
        self, tokens: int, logits: int, decodes: int, context: tuple[int, ...],
        prefill_tokens: int, pairs: tuple[int, ...], prefill_context: tuple[int, ...],
    ) -> float:  # fmt: skip
        gpu = self.gpu_seconds(tokens, logits, decodes, context, prefill_tokens, pairs, prefill_context)
        host = self.host_seconds(tokens, logits)
        return self.exposed + (max(gpu, host) if self.async_scheduling else gpu + host)

    def gpu_seconds(
        self, tokens: int, logits: int, decodes: int, context: tuple[int, ...],
        prefill_tokens: int, pairs: tuple[int, ...], prefill_context: tuple[int, ...],
    ) -> float:  # fmt: skip
        """Seconds of one step on the GPU, without what data-parallel ranks do together."""
        gpu = self.token_s[tokens] + self.logit_s[logits]
        for term in self.attention:
            if decodes:
                value = term.curve.locate(context[term.window] / decodes)[0]
                gpu += term.count * (term.launch + decodes * value)
            if prefill_tokens:
                read = term.per_entry * prefill_context[term.window] + term.per_token * prefill_tokens
                gpu += term.count * (term.prefill_launch + max(term.per_pair * pairs[term.window], read))
        for expansion in self.expansion:
            gpu += expansion.seconds(prefill_context[expansion.window] + decodes)
        return gpu

    def host_seconds(self, tokens: int, logits: int) -> float:
        """Seconds of the scheduler for one step."""
        return self.schedule + self.per_sequence * logits + self.per_token * tokens

    def decode_run(self, decodes: int, context: tuple[int, ...], growth: tuple[int, ...], limit: int) -> DecodeRun:
        limit, gpu, slope = self.gpu_run(decodes, context, growth, limit)
        return self.behind_host(DecodeRun(limit, gpu, slope), self.host_seconds(decodes, decodes))

    def gpu_run(self, decodes: int, context: tuple[int, ...], growth: tuple[int, ...], limit: int) -> DecodeRun:
        """`decode_run` on the GPU, without what data-parallel ranks do together."""
        gpu, slope_s = self.token_s[decodes] + self.logit_s[decodes], 0.0
        for term in self.attention:
            attended, grows, count = context[term.window], growth[term.window], term.count
            value, slope, after = term.curve.locate(attended / decodes)
            gpu += count * (term.launch + decodes * value)
            slope_s += count * slope * grows
            left = after * decodes - attended
            if left < grows * limit:
                limit = max(1, int(left / grows) + 1)
        for expansion in self.expansion:
            gpu += expansion.seconds(decodes)
        return DecodeRun(limit, gpu, slope_s)

    def behind_host(self, run: DecodeRun, host: float) -> DecodeRun:
        """A run on the GPU with the scheduler's time: hidden behind it under async scheduling, in front of it else."""
        limit, gpu, slope_s = run
        if not self.async_scheduling:
            return DecodeRun(limit, self.exposed + gpu + host, slope_s)
        if gpu >= host:
            return DecodeRun(limit, self.exposed + gpu, slope_s)
        if slope_s > 0.0 and (host - gpu) < slope_s * limit:  # the GPU overtakes the scheduler within this run
            limit = min(limit, int((host - gpu) / slope_s) + 1)
        return DecodeRun(limit, self.exposed + host, 0.0)


def compile_steps(
    *, model: ModelArch, node: Node, tp: int, dp: int = 1, ep: int = 1, pp: int = 1, calibration: Calibration,
    max_num_batched_tokens: int, max_num_seqs: int, async_scheduling: bool, cluster: Cluster | None = None,
) -> CompiledSteps:  # fmt: skip
    """Tabulate and extract coefficients from the array formulas; `step_estimate` on the same shape gives equal times.

    Tables cover 0..max_num_batched_tokens tokens and 0..max_num_seqs sampled sequences, and the tokens of all `dp`
    ranks together.
    """
    engine, links = calibration.engine, fabric(node, cluster)

    def work(step: StepShape, driver: Driver) -> list[Num]:
        """Seconds of every operator and collective that follows `driver`."""
        lowered = lower(
            model, step, tp=tp, dp=dp, ep=ep, pp=pp, expert_popularity=engine.expert_popularity,
            sampling_passes=engine.sampling_passes,
        )  # fmt: skip
        chosen = [item for item in lowered if item.driver == driver]
        return [
            op_estimate(item, node.accelerator, calibration.device, calibration.power).seconds
            if isinstance(item, Op)
            else collective_estimate(item, links, calibration.device).seconds
            for item in chosen
        ]

    tokens = np.arange(max_num_batched_tokens + 1, dtype=np.float64)
    logits = np.arange(max_num_seqs + 1, dtype=np.float64)
    token_s = np.sum(np.stack(work(_shape(model, tokens=tokens), "tokens")), axis=0)
    logit_s = np.sum(np.stack(work(_shape(model, logits=logits), "logits")), axis=0)
    together = np.arange(dp * max_num_batched_tokens + 1 if dp > 1 else 0, dtype=np.float64)
    group_s = np.sum(np.stack(work(_shape(model, group=together), "group")), axis=0) if dp > 1 else together
    return CompiledSteps(
        token_s.tolist(), logit_s.tolist(), *_attention_terms(model, node, tp, calibration), engine.step_host,
        engine.schedule_host, engine.sequence_host, engine.token_host, async_scheduling,
        group_s.tolist(),
    )  # fmt: skip


def _shape(
    model: ModelArch, *, tokens: Num = 0.0, logits: Num = 0.0, decodes: float = 0.0, attended: float = 0.0,
    prefill: float = 0.0, pairs: float = 0.0, entries: float = 0.0, group: Num | None = None,
) -> StepShape:  # fmt: skip
    windows = len(attention_windows(model))
    return StepShape(
        tokens, logits, decodes, (attended,) * windows, prefill, (pairs,) * windows, (entries,) * windows, group
    )


def _attention_terms(
    model: ModelArch, node: Node, tp: int, calibration: Calibration
) -> tuple[tuple[AttentionTerm, ...], tuple[ExpansionTerm, ...]]:
    """Coefficients by lowering unit batches; layers of equal attention share a term."""
    accelerator, device, windows = node.accelerator, calibration.device, attention_windows(model)
    bandwidth = accelerator.memory.read_bandwidth
    attention: dict[object, AttentionTerm] = {}
    expansion: dict[object, ExpansionTerm] = {}
    for group in model.layers:
        single = model.model_copy(update={"layers": (group.model_copy(update={"count": 1}),)})
        unit = {op.name: op for op in _ops(single, tp, prefill=1.0, pairs=1.0, entries=0.0, decodes=1.0, attended=1.0)}
        entry = {op.name: op for op in _ops(single, tp, prefill=1.0, pairs=1.0, entries=1.0, decodes=1.0, attended=1.0)}
        key, window = group.attention, windows.index(group.attention.window)
        before = attention[key].count if key in attention else 0
        prefill, one = unit["prefill_attention"], entry["prefill_attention"]
        rate = device.prefill_attention_compute * peak_flops(accelerator, prefill.dtype)
        moved = device.prefill_attention_bandwidth * bandwidth
        token_bytes = (
            float(prefill.read_bytes) / bandwidth + float(prefill.write_bytes) / accelerator.memory.write_bandwidth
        )
        attention[key] = AttentionTerm(
            window, before + group.count, device.decode_attention_launch,
            decode_attention_curve(unit["decode_attention"], accelerator, device), device.prefill_attention_launch,
            float(prefill.flops) / rate, float(one.read_bytes - prefill.read_bytes) / moved,
            token_bytes / device.prefill_attention_bandwidth,
        )  # fmt: skip
        if "kv_b_proj" in unit:
            one, two = unit["kv_b_proj"], entry["kv_b_proj"]  # one and two expanded entries
            rate = device.gemm_compute * peak_flops(accelerator, one.dtype)
            first, second = (_memory_seconds(op, node, device.gemm_bandwidth) for op in (one, two))
            expansion[key] = ExpansionTerm(
                window, before + group.count, device.gemm_launch, 2 * first - second, second - first,
                float(two.flops - one.flops) / rate,
            )  # fmt: skip
    return tuple(attention.values()), tuple(expansion.values())


def _ops(model: ModelArch, tp: int, **sums: float) -> list[Op]:
    lowered = lower(model, _shape(model, **sums), tp=tp)
    return [item for item in lowered if isinstance(item, Op)]


def _memory_seconds(op: Op, node: Node, fraction: float) -> float:
    memory = node.accelerator.memory
    return float(op.read_bytes / memory.read_bandwidth + op.write_bytes / memory.write_bandwidth) / fraction
