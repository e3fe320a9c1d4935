"""One engine step, explained: every operator, collective and host term added up, for floats or arrays alike."""

from __future__ import annotations

from perfsim.cost.collective import collective_estimate
from perfsim.cost.estimate import Estimate, overlap
from perfsim.cost.roofline import op_estimate
from perfsim.ops.op import Num, Op
from perfsim.ops.step import StepShape
from perfsim.ops.transformer import lower
from perfsim.spec.calibration import Calibration
from perfsim.spec.hardware import Node
from perfsim.spec.model import ModelArch


def step_estimate(
    step: StepShape, *, model: ModelArch, node: Node, tp: int, calibration: Calibration, async_scheduling: bool
) -> Estimate:
    """Duration of one step on one of `tp` GPUs (all run in lock step), with its energy per GPU.

    Async scheduling hides the scheduler behind the GPU (the longer of the two counts); otherwise they add up.
    """
    gpu = gpu_estimate(step, model=model, node=node, tp=tp, calibration=calibration)
    engine = calibration.engine
    schedule = _host(
        engine.schedule_host + engine.sequence_host * step.logits + engine.token_host * step.tokens, "scheduler"
    )
    hidden = overlap(gpu, schedule) if async_scheduling else gpu + schedule
    return hidden + _host(engine.step_host + 0.0 * step.tokens, "host")


def gpu_estimate(step: StepShape, *, model: ModelArch, node: Node, tp: int, calibration: Calibration) -> Estimate:
    """The GPU's share of a step: all kernels and collectives one after the other."""
    total = Estimate(0.0 * step.tokens)
    for work in lower(model, step, tp=tp, expert_popularity=calibration.engine.expert_popularity):
        if isinstance(work, Op):
            total += op_estimate(work, node.accelerator, calibration.device, calibration.power)
        else:
            total += collective_estimate(work, node.scale_up, calibration.device)
    return total


def _host(seconds: Num, name: str) -> Estimate:
    return Estimate(seconds, bound="host", d_seconds={name: seconds})
