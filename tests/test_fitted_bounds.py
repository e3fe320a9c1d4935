"""Packaged curves far outside their rows: to 10M tokens and 1,024 sequences, above the speed of light and monotone."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from perfsim.cost.collective import collective_estimate
from perfsim.cost.roofline import op_estimate
from perfsim.cost.speed_of_light import collective_seconds, op_seconds
from perfsim.cost.topology import fabric
from perfsim.ops.op import Collective, CollectiveKind, Op
from perfsim.ops.step import StepShape
from perfsim.ops.transformer import lower
from perfsim.spec import catalog
from perfsim.spec.load import find_calibration
from perfsim.spec.operators_file import FOLDER
from validation.compare.lowered import decodes, joined, prefills
from validation.ops.predict import CALIBRATION

DEVICES = sorted(path.stem for path in (CALIBRATION / FOLDER).glob("*.yaml"))
ENGINES = ("vllm", "sglang", "trtllm")
MODELS = ("llama-3.1-8b-instruct", "qwen3-30b-a3b", "deepseek-v2-lite", "google--gemma-4-26B-A4B")
# Around every tile of rows, and far beyond what was measured.
TOKENS = np.array([1, 2, 8, 15, 16, 17, 31, 32, 33, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1000, 4096,
                   4097, 16384, 131072, 131073, 10**6, 10**7], dtype=np.float64)  # fmt: skip
SEQUENCES = np.array([1, 2, 3, 8, 16, 17, 64, 100, 255, 256, 257, 512, 1000, 1024], dtype=np.float64)
CONTEXTS = np.array([1, 2, 16, 100, 128, 1000, 8192, 10**5, 10**6, 10**7], dtype=np.float64)


def grown(name: str, axis: str) -> StepShape:
    """Steps that grow along one axis."""
    model = catalog.model(name)
    if axis == "tokens":
        return prefills(model, sequences=np.ones(len(TOKENS)), new=TOKENS, past=0 * TOKENS)
    if axis == "past":
        return prefills(model, sequences=np.ones(len(CONTEXTS)), new=0 * CONTEXTS + 100, past=CONTEXTS)
    if axis == "sequences":
        return decodes(model, sequences=SEQUENCES, context=0 * SEQUENCES + 3000)
    one = np.ones(len(CONTEXTS))
    alone = decodes(model, sequences=64 * one, context=CONTEXTS)
    return alone if axis == "context" else joined(alone, prefills(model, sequences=one, new=512 * one, past=0 * one))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("axis", ["tokens", "past", "sequences", "context", "mixed context"])
def test_operators_stay_above_their_bound_and_grow(device: str, name: str, axis: str) -> None:
    model, chip = catalog.model(name), catalog.accelerator(device)
    work = [item for item in lower(model, grown(name, axis), tp=1, expert_popularity=1.0) if isinstance(item, Op)]
    for engine in ENGINES:
        calibration = find_calibration(accelerator=device, engine=engine)
        for op in work:
            took = np.asarray(op_estimate(op, chip, calibration.device, calibration.power).seconds)
            assert np.all(np.isfinite(took)), (engine, op.name)
            assert np.all(took >= op_seconds(op, chip) * op.active * (1 - 1e-12)), (engine, op.name)
            steps = pairwise(np.atleast_1d(took))
            assert all(after >= before * (1 - 1e-12) for before, after in steps), (engine, op.name, took)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "reduce_scatter", "all_to_all"])
def test_collectives_stay_above_their_bound_and_grow(device: str, kind: CollectiveKind) -> None:
    # Far beyond a node too: 1,024 GPUs on its links.
    links, sizes = replace(fabric(catalog.node(device)), domain=1024, gpus=1024), np.geomspace(16, 1e15, 300)
    for engine in ENGINES:
        found = find_calibration(accelerator=device, engine=engine).device
        for gpus in (2, 4, 8, 72, 1024):
            work = Collective(kind, kind, 1, sizes, gpus)
            took = np.asarray(collective_estimate(work, links, found).seconds)
            assert np.all(took >= collective_seconds(work, links) * (1 - 1e-12)), (engine, gpus)
            assert np.all(np.diff(took) >= -1e-12 * took[1:]), (engine, gpus)
