"""The steady state of one replica without replaying anything.

Decoding sequences share the engine as the jobs of a processor-sharing queue with a rate that depends on their number:
n of them finish at n / (mean output x t(n)) per second, with t(n) the length of a step. Such a queue is insensitive to
the distribution of the work (Kelly, "Reversibility and Stochastic Networks", 1979, ch. 3): with Poisson arrivals

    P(n) ~ prod_{i=1..n} lambda x mean decode steps x t(i) / i

Prefill takes its share of the time: t(n) = decode step / (1 - lambda x prefill seconds). Beyond the slots or the KV
pool (n_max sequences) requests wait, and the product continues with the rate of n_max. A first token waits for a slot,
for prefills ahead of it (Pollaczek-Khinchine), for the step in flight (and one more under async scheduling), and for
its own steps. Neglected: correlation of arrivals, preemption, first steps that wait for kernels to be compiled, and the
spread of everything: only means are reported. Speculative decoding enters with its mean emission per step. In the
tested range (load up to 75%, mean prompt up to half the token budget) the means of TTFT, TPOT and E2E are within 10% of
the simulation. Outside it TPOT comes out low, by a quarter to a third for prompts as long as the budget at 60-80% load,
because a long prefill stalls decodes that have just begun; a KV pool full enough for preemptions and arrivals in bursts
make it low too. `in_range` says which it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from perfsim.errors import InputError
from perfsim.ops.step import attended_pairs, context_read
from perfsim.serving.demand import Demand, demand_of
from perfsim.serving.replica import ReplicaPlan
from perfsim.spec.scenario import Scenario
from perfsim.traffic.stream import TracePath

ITERATIONS = 3
TESTED_LOAD, TESTED_PROMPT = 0.8, 0.5  # load; mean uncached prompt over the token budget
GRID = 17  # batch sizes at which what a prefill adds is priced; denser for small batches
STRATA = 64  # prompts that stand for the whole distribution, one per 1/64 of the requests


@dataclass(frozen=True, slots=True)
class SteadyState:
    """Means in seconds; `load` is the rate over the largest that the replica sustains, None latencies: unstable."""

    rate: float
    load: float
    max_rate: float
    ttft: float | None
    engine_ttft: float | None
    tpot: float | None
    e2e: float | None
    sequences: float | None
    prompt_tokens: float
    cached_tokens: float
    output_tokens: float
    in_range: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class _Replica:
    """Step times of one plan under one demand."""

    plan: ReplicaPlan
    decode_s: NDArray[np.float64]  # index n: a step with n sequences
    context: tuple[float, ...]  # mean attended tokens of a sequence, per span
    decode_steps: float  # mean per request
    uncached: list[tuple[int, int]]  # (prompt, cached tokens) per stratum

    def prefill(self, decodes: int, group: int) -> tuple[NDArray[np.float64], float]:
        """Seconds that each stratum's prefill adds to steps of `decodes` sequences, and the mean number of steps.

        `group` equal prefills share their steps.
        """
        priced = [_prefill(self.plan, prompt, cached, decodes, self.context, group) for prompt, cached in self.uncached]
        return np.array([seconds for seconds, _ in priced]), float(np.mean([chunks for _, chunks in priced]))

    def extra_by_size(self, group: int) -> NDArray[np.float64]:
        """Mean seconds that a prefill adds to steps of n sequences, for every n: linear between a few n."""
        slots = len(self.decode_s) - 1
        sizes = np.unique(np.round(np.linspace(0.0, 1.0, GRID) ** 2 * slots)).astype(int)
        priced = [float(self.prefill(size, group)[0].mean()) for size in sizes.tolist()]
        return np.asarray(np.interp(np.arange(slots + 1), sizes, priced))


def steady_state(scenario: Scenario, plan: ReplicaPlan, *, trace_path: TracePath | None) -> SteadyState:
    """Solve the steady state of `scenario`; a closed loop is solved for the rate its clients reach.

    Raises InputError for a policy with LoRA adapters or a KV tier.
    """
    if scenario.policy.lora is not None:
        raise InputError("policy.lora: an estimate knows no adapters; use simulate for this policy")
    if scenario.policy.kv_offload is not None:
        raise InputError("policy.kv_offload: an estimate knows no KV tiers; use simulate for this policy")
    demand = demand_of(
        scenario,
        trace_path=trace_path,
        max_model_len=plan.config.max_model_len,
        block_size=plan.config.block_size,
        pool_tokens=plan.config.total_blocks * plan.config.block_size,
    )
    replica = _price(plan, demand)
    most = _saturation(replica)
    if demand.rate is not None:
        return replace(
            _solve(scenario, demand, replica, demand.rate, most), notes=(*demand.notes, *_peak(demand, most))
        )
    low, high = 0.0, most
    profile = scenario.calibration.engine
    for _ in range(60):  # the cycle time grows with the rate: bisect clients = rate x cycle
        middle = (low + high) / 2
        state = _solve(scenario, demand, replica, middle, most)
        cycle = None if state.e2e is None else state.e2e + demand.think_time + profile.egress
        low, high = (low, middle) if cycle is None or middle * cycle > demand.clients else (middle, high)
    return _solve(scenario, demand, replica, low, most)


def _peak(demand: Demand, most: float) -> tuple[str, ...]:
    """What to know when the rate varies and the answer is about its mean."""
    if demand.peak is None or demand.rate is None:
        return ()
    note = (
        f"the rate varies up to {demand.peak:.3g} requests/s: this is the steady state at its mean, {demand.rate:.3g}"
    )
    if demand.peak >= most:
        note += f"; beyond {most:.3g} queues grow, which the means do not show"
    return (note,)


def _price(plan: ReplicaPlan, demand: Demand) -> _Replica:
    config, steps, windows = plan.config, plan.steps, plan.windows
    decode_steps = (demand.output - 1) / plan.config.mean_emission
    queries = 1 + len(config.acceptance)
    total = decode_steps.sum()
    lived = demand.prompt + demand.output / 2  # mean context while decoding
    mean_context = float((lived * decode_steps).sum() / total) if total else float(demand.prompt.mean())
    filled = np.ceil((demand.prompt + demand.output - 1) / config.block_size)
    held = float(np.ceil((lived + queries + config.lookahead) / config.block_size).mean()) + config.window_blocks
    held += sum(groups * float(np.minimum(filled, most).mean()) for most, groups in config.span_blocks)
    slots = max(1, min(config.max_num_seqs, int(config.total_blocks / held), config.max_num_batched_tokens // queries))
    decode_s = np.zeros(slots + 1)
    reach, zeros = [span.mean_attended(mean_context) for span in windows], (0,) * len(windows)
    for n in range(1, slots + 1):
        context = tuple(int(n * tokens) for tokens in reach)
        if queries > 1:
            decode_s[n] = steps.step_seconds(n * queries, n, n, context, 0, zeros, zeros)
        else:
            decode_s[n] = steps.decode_run(n, context, (n,) * len(windows), 1).first_s
    order = np.argsort(demand.prompt - demand.cached, kind="stable")
    picks = order[((np.arange(STRATA) + 0.5) / STRATA * len(order)).astype(int)]
    strata = [(int(demand.prompt[i]), int(demand.cached[i])) for i in picks]
    return _Replica(plan, decode_s, tuple(reach), float(decode_steps.mean()), strata)


def _prefill(
    plan: ReplicaPlan, prompt: int, cached: int, decodes: int, context: tuple[float, ...], group: int
) -> tuple[float, int]:
    """(seconds that the chunks of a prompt, its part of `group`, add to the decode steps they ride on; chunks)."""
    windows, zeros = plan.windows, (0,) * len(plan.windows)
    attended = tuple(int(decodes * tokens) for tokens in context)
    drafted = decodes * (1 + len(plan.config.acceptance))
    budget = plan.config.max_num_batched_tokens - drafted
    if budget <= 0:  # no prefill while so many decode: whatever comes waits for one of them to end
        drafted, budget = 0, plan.config.max_num_batched_tokens
        decodes, attended = 0, (0,) * len(windows)
    group = max(1, min(group, budget // max(1, prompt - cached), plan.config.max_num_seqs - decodes))
    alone = plan.steps.step_seconds(drafted, decodes, decodes, attended, 0, zeros, zeros)
    seconds, past, chunks = 0.0, cached, 0
    while past < prompt:
        chunk = min(budget, prompt - past)
        pairs = tuple(group * attended_pairs(chunk, past, span) for span in windows)
        read = tuple(group * context_read(chunk, past, span) for span in windows)
        new, sampled = group * chunk, min(decodes + group, plan.config.max_num_seqs)
        longest = 0, past + chunk
        whole = plan.steps.step_seconds(drafted + new, sampled, decodes, attended, new, pairs, read, longest=longest)
        seconds += (whole - alone) / group
        past += chunk
        chunks += 1
    return seconds, chunks


def _saturation(replica: _Replica) -> float:
    """The largest sustainable rate: all slots busy, prefills taking the rest of the time."""
    slots = len(replica.decode_s) - 1
    per_request = replica.decode_steps * replica.decode_s[slots] / slots
    return float(1.0 / (per_request + replica.prefill(slots, slots)[0].mean()))


def _solve(scenario: Scenario, demand: Demand, replica: _Replica, rate: float, most: float) -> SteadyState:
    profile = scenario.calibration.engine
    prompt, cached = float(demand.prompt.mean()), float(demand.cached.mean())
    short = prompt - cached <= TESTED_PROMPT * replica.plan.config.max_num_batched_tokens
    in_range = short and rate <= TESTED_LOAD * most
    means = prompt, cached, float(demand.output.mean()), in_range
    if rate >= most:
        return SteadyState(rate, rate / most, most, None, None, None, None, None, *means)
    group = 1
    for _ in range(ITERATIONS):  # the longer the steps, the more prefills share one
        step = replica.decode_s / np.maximum(1.0 - rate * replica.extra_by_size(group), 1e-3)
        decoding, waiting, busy = _numbers(rate * replica.decode_steps * step)
        step_s = float(np.interp(decoding, np.arange(len(step)), step))
        group = max(1, round(rate * step_s))
    prefill_s, chunks = replica.prefill(round(decoding), group)
    share = min(rate * float(prefill_s.mean()), 0.999)
    per_step = decoding / (rate * replica.decode_steps) if replica.decode_steps else 0.0
    tpot = per_step / replica.plan.config.mean_emission if replica.decode_steps else None
    ahead = rate * float((prefill_s**2).mean()) / (2.0 * (1.0 - share))
    residual = busy * step_s / 2.0
    room = max(0.0, 1.0 - float((demand.prompt - demand.cached).mean()) / replica.plan.config.max_num_batched_tokens)
    beside = room * share * (residual + ahead)  # prefills that arrive later and still ride on the same steps
    in_flight = residual + (busy * step_s if scenario.policy.async_scheduling else 0.0)
    own = float(prefill_s.mean()) + step_s * chunks + beside
    engine_ttft = waiting / rate + ahead + in_flight + own
    ttft = profile.ingress + engine_ttft + profile.egress
    e2e = ttft + replica.decode_steps * per_step
    return SteadyState(rate, rate / most, most, ttft, engine_ttft, tpot, e2e, decoding, *means)


def _numbers(offered: NDArray[np.float64]) -> tuple[float, float, float]:
    """(mean sequences decoding, mean waiting for a slot, chance that any decodes); offered[n]: work per second at n."""
    slots = len(offered) - 1
    log_weight = np.concatenate([[0.0], np.cumsum(np.log(offered[1:] / np.arange(1, slots + 1)))])
    weight = np.exp(log_weight - log_weight.max())
    ratio = min(offered[slots] / slots, 1.0 - 1e-9)
    tail = weight[-1] * ratio / (1.0 - ratio)  # all states with a queue: geometric
    total = weight.sum() + tail
    decoding = float((np.arange(slots + 1) * weight).sum() + slots * tail) / total
    waiting = float(weight[-1] * ratio / (1.0 - ratio) ** 2) / total
    return decoding, waiting, 1.0 - float(weight[0]) / total
