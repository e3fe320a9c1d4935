"""Routing of aiconfigurator's fused experts when they are spread over ranks: how much the timed rank gets.

Its benchmark draws each expert's load from a power law and times the rank with the most rows.
"""

from __future__ import annotations

from functools import cache

import numpy as np

DRAWS, SEED = 48, 20260101
LEAST_LOAD, MOST_LOAD = 1.0, 0.8  # of the power law: rows of an expert, and their share of all tokens at most
# Hidden states that vLLM's kernel moves per token that enters a rank but that no expert there takes: it aligns, masks
# and adds up all of them. Eight describe ranks with equal loads best on H100, L40S and B200; TensorRT-LLM has none.
IDLE_PASSES = {"vllm": 8.0}

# (hidden, experts, picked per token) of models whose experts have no gate, so two matrices instead of three: NVIDIA's
# Nemotron 3 Nano and Ultra, "relu2" in their config.json (Ultra's experts work on a latent of 2,048). The source names
# kernels without a gate for TensorRT-LLM only. Curves fitted without these rows predict vLLM's within a few percent
# for two matrices, on every device but the one that was timed under vLLM 0.14, which is right for three.
UNGATED = ((2688.0, 128.0, 6.0), (2048.0, 512.0, 22.0))
GATED_VERSION = "0.14.0"


@cache
def largest_share(experts: int, ranks: int, exponent: float, tokens: float) -> float:
    """The median over draws of the largest rank's share of all rows, its experts drawn at random; 1 / ranks at least.

    Loads have the density x^-exponent between one row and 0.8 of the tokens, as the benchmark draws them.
    """
    if ranks == 1 or exponent <= 0 or experts % ranks:
        return 1.0 / ranks
    drawn = np.random.Generator(np.random.PCG64(SEED)).random((DRAWS, experts))
    low, high, power = LEAST_LOAD, max(1.001 * LEAST_LOAD, MOST_LOAD * tokens), 1.0 - exponent
    loads = (low**power + drawn * (high**power - low**power)) ** (1.0 / power)
    shares = loads.reshape(DRAWS, ranks, experts // ranks).sum(axis=2) / loads.sum(axis=1, keepdims=True)
    return float(np.median(shares.max(axis=1)))
