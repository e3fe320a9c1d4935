"""One engine step, explained: every operator, collective and host term added up, for floats or arrays alike."""

from __future__ import annotations

from collections.abc import Iterator

from perfsim.cost.alike import Alike
from perfsim.cost.collective import collective_estimate
from perfsim.cost.estimate import Estimate, overlap
from perfsim.cost.launches import HostTerms, host_terms, launch_seconds
from perfsim.cost.roofline import op_estimate
from perfsim.cost.topology import fabric
from perfsim.ops.lora import lora_ops
from perfsim.ops.op import Num, Op
from perfsim.ops.speculation import lower_with_drafts
from perfsim.ops.step import StepShape
from perfsim.spec.calibration import Calibration
from perfsim.spec.cluster import Cluster
from perfsim.spec.hardware import Node
from perfsim.spec.model import ModelArch
from perfsim.spec.policy import ServingPolicy

PLAIN = ServingPolicy()  # of it, how K/V are stored, what drafts, and adapters


def step_estimate(
    step: StepShape, *, model: ModelArch, node: Node, tp: int, calibration: Calibration, async_scheduling: bool,
    dp: int = 1, ep: int = 1, pp: int = 1, cluster: Cluster | None = None,
    policy: ServingPolicy = PLAIN,
) -> Estimate:  # fmt: skip
    """Duration of one step on one of `tp` GPUs (all run in lock step), with its energy per GPU.

    With `pp` stages it is the time from the first to the last of them, and the energy of one GPU of each.

    Async scheduling hides the scheduler behind the GPU (the longer of the two counts); otherwise they add up. Launches,
    where no CUDA graphs are used, hide behind it either way.
    """
    gpu = Estimate(0.0 * step.tokens)
    for part in gpu_parts(
        step, model=model, node=node, tp=tp, calibration=calibration,
        dp=dp, ep=ep, pp=pp, cluster=cluster, policy=policy,
    ):  # fmt: skip
        gpu += part
    launch = launch_seconds(model, calibration.engine, tp=tp, dp=dp, ep=ep, pp=pp, policy=policy)
    terms = host_terms(calibration.engine, launch=launch, asynchronous=async_scheduling)
    schedule, exposed = host_parts(step, calibration, terms)
    hidden = overlap(gpu, schedule) if terms.hides else gpu + schedule
    return hidden + exposed


def gpu_parts(
    step: StepShape, *, model: ModelArch, node: Node, tp: int, calibration: Calibration,
    dp: int = 1, ep: int = 1, pp: int = 1, cluster: Cluster | None = None,
    policy: ServingPolicy = PLAIN, alike: Alike | None = None,
) -> Iterator[Estimate]:  # fmt: skip
    """Every operator and collective of a step on one GPU, in order; they run one after the other.

    `alike` saves time where many of the steps have equally many tokens.
    """
    engine, links = calibration.engine, fabric(node, cluster)
    passes, kernels = engine.sampler(policy.sampling)
    for work in lower_with_drafts(
        model, step, speculative=policy.speculative, tp=tp, dp=dp, ep=ep, pp=pp,
        expert_popularity=engine.expert_popularity, sampling_passes=passes, sampling_kernels=kernels,
        kv_cache_dtype=policy.kv_cache_dtype, all2all_backend=policy.all2all_backend or engine.all2all_backend,
    ):  # fmt: skip
        if alike is not None and isinstance(work, Op) and work.driver == "tokens":
            one = op_estimate(alike.reduced(work), node.accelerator, calibration.device, calibration.power)
            yield alike.spread(one)
        elif isinstance(work, Op):
            yield op_estimate(work, node.accelerator, calibration.device, calibration.power)
        else:
            yield collective_estimate(work, links, calibration.device)
    for adapter in lora_ops(model, step, policy.lora, tp=tp):
        yield op_estimate(adapter, node.accelerator, calibration.device, calibration.power)


def host_parts(step: StepShape, calibration: Calibration, terms: HostTerms) -> tuple[Estimate, Estimate]:
    """(time of scheduler and launches, which may hide behind the GPU; time the GPU waits for in every step)."""
    engine = calibration.engine
    exposed = terms.exposed + engine.sequence_host * step.logits + 0.0 * step.tokens
    return _host(terms.scheduler + engine.token_host * step.tokens, "scheduler"), _host(exposed, "host")


def _host(seconds: Num, name: str) -> Estimate:
    return Estimate(seconds, bound_s={"host": seconds}, d_seconds={name: seconds})
