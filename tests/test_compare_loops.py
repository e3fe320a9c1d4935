"""Closed loops with fewer requests per client than were sent: what stands for those left out."""

from __future__ import annotations

import json

import numpy as np
import pytest

from validation.compare import loops, plans
from validation.compare.ask import answer, ask

CLIENTS, SENT = 32, 10


def loop(requests: int):
    workload, sent = plans.closed_loop(isl=400, osl=60, clients=CLIENTS, spread=False)
    assert sent == SENT
    content = {"model": "llama-3.1-8b", "hardware": "h100-80gb-sxm", "engine": "vllm", "parallel": {"tp": 1},
               "workload": {**workload, "num_requests": requests * CLIENTS}}  # fmt: skip
    return answer(ask(content, sent=sent), bands=False).metrics


def test_weights_sum_to_all_requests():
    sent = np.arange(CLIENTS * 4)
    found = loops.weights(sent, clients=CLIENTS, simulated=4, measured=SENT)
    assert found.sum() == CLIENTS * SENT
    assert set(found[:CLIENTS]) == set(found[-CLIENTS:]) == {1.0}
    assert set(found[CLIENTS:-CLIENTS]) == {4.0}
    assert set(loops.weights(sent, clients=CLIENTS, simulated=4, measured=4)) == {1.0}


def test_short_loops_are_like_long_ones():
    long, short = loop(SENT), loop(5)
    paths = [(name, "mean") for name in ("ttft", "tpot", "e2e")] + [("throughput", "output_tokens_per_s")]
    for first, second in paths:
        assert short[first][second] == pytest.approx(long[first][second], rel=0.005)


def test_statistics_are_those_of_repeated_values():
    values, repeats = np.array([3.0, 1.0, 2.0, np.nan]), np.array([2.0, 3.0, 1.0, 5.0])
    requests = dict.fromkeys(("ttft_s", "tpot_s", "e2e_s", "output_tokens"), values) | {"arrival_s": np.zeros(4)}
    requests["e2e_s"] = np.array([3.0, 1.0, 2.0, 4.0])
    found = loops.metrics_of(requests, repeats, clients=1)["ttft"]
    repeated = np.repeat(values[:3], repeats[:3].astype(int))
    assert found["mean"] == pytest.approx(repeated.mean())
    for name, level in loops.STATISTICS.items():
        assert found[name] == pytest.approx(np.quantile(repeated, level))


def test_only_long_loops_are_cut():
    def requests(clients: int, isl: int) -> int:
        workload, _ = plans.closed_loop(isl=isl, osl=10, clients=clients, spread=False)
        return workload["num_requests"] // clients

    assert [requests(clients, 1024) for clients in (1, 64, 512, 4096, 65536)] == [10, 10, 10, 3, 3]
    assert requests(64, 1_000_000) == 3
    json.dumps(plans.closed_loop(isl=1, osl=1, clients=1, spread=True))
