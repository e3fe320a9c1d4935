"""Measured and guessed coefficients that turn work into time: one set per device, one set per engine.

The loader fills a Calibration from `hardware/calibration/*.yaml`; the cost model reads nothing else. `status` and
`source` travel with the numbers, so that a result can say which of them were never fitted.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from perfsim.spec.base import Bytes, Seconds, Spec
from perfsim.spec.curves import Fraction, OperatorCurves
from perfsim.spec.engine_version import EngineVersion
from perfsim.spec.policy import All2AllBackend
from perfsim.spec.uncertainty import Uncertainty


class DeviceEfficiency(Spec):
    """How close one device comes to its datasheet, per kind of operator.

    Fractions are of the dense peak for the dtype or of HBM bandwidth; `*_launch` is the time of an operator with no
    work, under CUDA graphs. `decode_attention` holds (context, bandwidth fraction) knots on a growing context axis:
    decode attention time is piecewise linear between them, which is what makes fast-forwarding exact. `collective_*`
    hold inside a node; between nodes, and for the traffic of in-switch reduction, too unless `network_*` and
    `in_switch_bandwidth` are given. `curves` were fitted to measured kernels; where they apply, they replace fractions.
    """

    gemm_launch: Seconds
    gemm_bandwidth: Fraction
    gemm_compute: Fraction
    prefill_attention_launch: Seconds
    prefill_attention_compute: Fraction
    prefill_attention_bandwidth: Fraction
    decode_attention_launch: Seconds
    decode_attention_compute: Fraction
    decode_attention: tuple[tuple[float, Fraction], ...] = Field(min_length=1)
    moe_launch: Seconds
    moe_bandwidth: Fraction
    moe_compute: Fraction
    elementwise_launch: Seconds
    elementwise_bandwidth: Fraction
    collective_launch: Seconds
    collective_hop: Seconds
    collective_bandwidth: Fraction
    in_switch_bandwidth: Fraction | None = None
    network_hop: Seconds | None = None
    network_bandwidth: Fraction | None = None
    curves: OperatorCurves = OperatorCurves()

    @model_validator(mode="after")
    def _knots_grow(self) -> Self:
        contexts = [context for context, _ in self.decode_attention]
        if contexts != sorted(set(contexts)) or contexts[0] <= 0:
            raise ValueError("decode_attention knots must have growing positive contexts")
        return self


class EngineProfile(Spec):
    """What the serving engine adds to the kernels, by engine and version family.

    `step_host`, plus `sequence_host` per sequence, is host time that the GPU waits for in every step. `schedule_host`,
    plus `token_host` per token, is scheduler time: hidden behind the GPU under async scheduling (the longer of the two
    counts), added to it otherwise. `launch_host` is what launching one kernel takes where no CUDA graph does: the host
    launches ahead of the GPU, and the slower of the two counts. `sampling_passes` is how many times the sampler streams
    the fp32 logits of one sequence through HBM, in `sampling_kernels` kernels per step, where it has to sort them
    (top-p), and `plain_sampling_passes` (None: as many), in one kernel, where it has not. `ingress` and `egress` are
    client-side: before the request is queued, and from a token to its arrival. `expert_popularity` is the Zipf exponent
    of routing (0: uniform), `all2all_backend` what carries tokens to whole experts unless a policy says so.
    `kernel_compile` is what the first step of a kind waits for kernels of experts that are compiled then.

    Memory per GPU, as vLLM's start-up profiling sees it: `reserved_fraction` of the labelled capacity belongs to the
    driver, `context_memory` to libraries, `communication_memory` to collectives (tp > 1 only); `activation_copies` and
    `logit_copies` say how many of one layer's widest activations and of the fp32 logits are alive at the peak.
    """

    name: str
    version: str
    step_host: Seconds
    schedule_host: Seconds
    sequence_host: Seconds
    token_host: Seconds
    launch_host: Seconds = 0.0
    sampling_passes: float = Field(ge=0)
    sampling_kernels: int = Field(default=1, gt=0, le=10_000)
    plain_sampling_passes: float | None = Field(default=None, ge=0)
    ingress: Seconds
    egress: Seconds
    expert_popularity: float = Field(ge=0, le=4)
    all2all_backend: All2AllBackend = "all_to_all"
    kernel_compile: Seconds = 0.0
    reserved_fraction: float = Field(ge=0, lt=1)
    context_memory: Bytes
    communication_memory: Bytes
    activation_copies: float = Field(gt=0)
    logit_copies: float = Field(gt=0)

    def sampler(self, sampling: Literal["sorted", "plain"]) -> tuple[float, int]:
        """(passes over the logits, kernels) of the sampler."""
        if sampling == "sorted" or self.plain_sampling_passes is None:
            return self.sampling_passes, self.sampling_kernels
        return self.plain_sampling_passes, 1


class PowerModel(Spec):
    """Dynamic power above idle, as fractions of (TDP - idle): one with compute saturated, one with HBM saturated."""

    compute_fraction: Fraction
    memory_fraction: Fraction


class Calibration(Spec):
    """All coefficients of one run; `status` says whether anybody fitted them, `uncertainty` how far off they may be."""

    status: Literal["first-guess", "fitted"]
    source: str
    device: DeviceEfficiency
    borrowed_from: str | None = Field(default=None, description="device whose curves stand in for this one's")
    engine: EngineProfile
    engine_version: EngineVersion | None = Field(default=None, description="whose kernels were asked for; None: newest")
    engine_borrowed: str | None = Field(default=None, description="why another engine's profile stands in for it")
    power: PowerModel
    uncertainty: Uncertainty | None = None
