"""Prefill time of one long prompt, its bound, and what was measured: `python -m validation.report.long_prefill`.

The prompt is computed in chunks of vLLM's token budget on the fewest GPUs (tp 1, 2, 4, 8 of one node) that hold the
model and the K/V of the longest prompt. The bound is that of the whole prompt in one step: the longest of FLOPs of the
matrix units over their dense peak, bytes of weights, K/V and activations over HBM bandwidth, and bytes over links, as
if all three went on at once. MFU is FLOPs of the matrix units over dense peak and predicted time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from perfsim.cost.device import peak_flops
from perfsim.cost.memory import memory_plan
from perfsim.cost.speed_of_light import collective_seconds, op_seconds
from perfsim.cost.step import step_estimate
from perfsim.cost.topology import fabric
from perfsim.errors import InfeasibleError, InputError
from perfsim.ops.op import Op
from perfsim.ops.step import StepShape, attention_spans, prefill_sums
from perfsim.ops.transformer import lower
from perfsim.spec import catalog
from perfsim.spec.calibration import Calibration
from perfsim.spec.engine_defaults import batch_defaults, check_parallel
from perfsim.spec.hardware import Node
from perfsim.spec.load import find_calibration
from perfsim.spec.model import ModelArch
from perfsim.spec.policy import ParallelPlan, ServingPolicy
from perfsim.spec.yaml import load_yaml
from validation.report.markdown import seconds as in_words
from validation.report.markdown import table

FILE = Path(__file__).with_name("long_prefill.yaml")
MATRIX = frozenset({"gemm", "lm_head", "moe", "prefill_attention"})


@dataclass(frozen=True, slots=True)
class Prefill:
    """One prompt: predicted seconds, the bound of the prompt, and the bound of the very kernels that are priced."""

    model: str
    device: str
    tp: int
    tokens: int
    chunk: int
    seconds: float
    bound: float
    kernels_bound: float
    limit: str
    mfu: float


def asked() -> dict[str, Any]:
    """Lengths, models and devices of `long_prefill.yaml`."""
    return load_yaml(FILE)


def prefill_step(model: ModelArch, chunks: list[tuple[int, int]]) -> StepShape:
    """Steps that compute one chunk of one prompt each, (tokens, past), as columns; every step is sampled once."""
    spans = attention_spans(model)
    sums = [prefill_sums(spans, [chunk]) for chunk in chunks]
    tokens = np.array([float(new) for new, _ in chunks])
    nothing = 0.0 * tokens
    pairs, read = (
        tuple(np.array([float(one[part][at]) for one in sums]) for at in range(len(spans))) for part in (0, 1)
    )
    return StepShape(tokens, nothing + 1.0, nothing, tuple(nothing for _ in spans), tokens, pairs, read)


def chunks_of(tokens: int, chunk: int) -> list[tuple[int, int]]:
    """(new tokens, tokens before them) of every step.

    >>> chunks_of(10, 4)
    [(4, 0), (4, 4), (2, 8)]
    """
    return [(min(chunk, tokens - past), past) for past in range(0, tokens, chunk)]


def prefill(model: ModelArch, node: Node, *, tokens: int, tp: int, chunk: int, calibration: Calibration) -> Prefill:
    """Predict one prompt on an otherwise idle engine; every chunk is one step, with the host's part."""
    step = prefill_step(model, chunks_of(tokens, chunk))
    said = step_estimate(step, model=model, node=node, tp=tp, calibration=calibration, async_scheduling=True)
    total, chip, links = float(np.sum(said.seconds)), node.accelerator, fabric(node, None)
    popularity = calibration.engine.expert_popularity
    kernels = 0.0
    for work in lower(model, step, tp=tp, expert_popularity=popularity):
        best = op_seconds(work, chip) if isinstance(work, Op) else collective_seconds(work, links)
        kernels += float(np.sum(best))
    parts, flops = _whole(model, node, tokens=tokens, tp=tp, popularity=popularity)
    limit = max(parts, key=lambda name: parts[name])
    peak = peak_flops(chip, model.dtype)
    return Prefill(
        model.name, chip.name, tp, tokens, chunk, total, parts[limit], kernels, limit, flops / (peak * total)
    )  # fmt: skip


def _whole(
    model: ModelArch, node: Node, *, tokens: int, tp: int, popularity: float
) -> tuple[dict[str, float], float]:  # fmt: skip
    """(seconds of each resource for the prompt in one step, FLOPs of the matrix units) of one GPU."""
    chip, links = node.accelerator, fabric(node, None)
    spent, flops = {"compute": 0.0, "memory": 0.0, "link": 0.0}, 0.0
    for work in lower(model, prefill_step(model, [(tokens, 0)]), tp=tp, expert_popularity=popularity):
        if not isinstance(work, Op):
            spent["link"] += float(np.sum(collective_seconds(work, links)))
            continue
        moved = work.read_bytes / chip.memory.read_bandwidth + work.write_bytes / chip.memory.write_bandwidth
        spent["memory"] += float(np.sum(work.count * moved))
        if work.kind in MATRIX:
            spent["compute"] += float(np.sum(work.count * work.flops)) / peak_flops(chip, work.dtype)
            flops += float(np.sum(work.count * work.flops))
    return spent, flops


def fewest_gpus(model: ModelArch, node: Node, *, tokens: int, chunk: int, calibration: Calibration) -> int | None:
    """The smallest tp of one node whose GPUs hold the model and K/V of one prompt; None when all are too few."""
    policy = ServingPolicy(max_num_batched_tokens=chunk, max_num_seqs=1, max_model_len=tokens)
    for tp in (1, 2, 4, 8):
        parallel = ParallelPlan(tp=tp)
        try:
            check_parallel(parallel, model=model, node=node)
            plan = memory_plan(
                model=model, accelerator=node.accelerator, parallel=parallel, engine=calibration.engine, policy=policy
            )
        except (InfeasibleError, InputError):
            continue
        if plan.usable_blocks >= ceil(tokens / plan.block_size) + plan.window_blocks:
            return tp
    return None


def predictions() -> Iterator[Prefill]:
    """All prompts of `long_prefill.yaml` on devices that hold them."""
    content = asked()
    for name in content["models"]:
        model = catalog.model(name["name"])
        for device in content["devices"]:
            node = catalog.node(device)
            calibration = find_calibration(accelerator=node.accelerator.name, engine="vllm")
            chunk = batch_defaults(node.accelerator)[0]
            tp = fewest_gpus(model, node, tokens=max(content["tokens"]), chunk=chunk, calibration=calibration)
            if tp is None:
                continue
            for tokens in content["tokens"]:
                yield prefill(model, node, tokens=tokens, tp=tp, chunk=chunk, calibration=calibration)


def length(tokens: int) -> str:
    """1,024 tokens are 1K.

    >>> length(1024), length(131072), length(1048576)
    ('1K', '128K', '1M')
    """
    return f"{tokens >> 20}M" if tokens >= 1 << 20 else f"{tokens >> 10}K"


def rows(found: list[Prefill]) -> Iterator[str]:
    """The table in Markdown."""
    kinds = {catalog.model(entry["name"]).name: entry["kind"] for entry in asked()["models"]}
    yield from table(("model", "device", "tp", "prompt", "predicted", "bound", "ratio", "bound by", "MFU"), [
        (f"{one.model} ({kinds[one.model]})", one.device, str(one.tp), length(one.tokens), in_words(one.seconds),
         in_words(one.bound), f"{one.seconds / one.bound:.2f}", one.limit, f"{one.mfu:.0%}")
        for one in found
    ], left=2)  # fmt: skip


def main() -> int:
    """Print the table."""
    print("\n".join(rows(list(predictions()))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
