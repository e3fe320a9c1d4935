"""Clusters of tiny engines for tests: any deployment, fast or stepwise, with its books."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from test_fast_forward import BLOCK, Log, compiled, tiny_model

from perfsim.ops.step import attention_spans
from perfsim.serving.check import Ledger, check_conservation
from perfsim.serving.cluster import Cluster
from perfsim.serving.driver import ClosedLoop, run_open_loop
from perfsim.serving.fleet import Replica
from perfsim.serving.front import EngineConfig
from perfsim.serving.replica import GroupPlan, ReplicaPlan, build_engine
from perfsim.spec.deployment import Deployment
from perfsim.spec.load import load_scenario
from perfsim.spec.policy import ParallelPlan
from perfsim.traffic import ClosedLoopSource, RequestChunk

# Gives the transfers a model's K/V sizes; the engines of `compiled` are far smaller.
SCENARIO = load_scenario(None)
SMALL = EngineConfig(
    max_num_batched_tokens=256, max_num_seqs=16, max_model_len=4096, block_size=BLOCK, total_blocks=100
)  # fmt: skip


@dataclass
class Run:
    """What came out of a run; `rows` are one tuple per finished request, sorted by request."""

    cluster: Cluster
    log: Log
    columns: list[str]

    @property
    def rows(self) -> np.ndarray:
        return np.array(sorted(self.log.requests, key=lambda row: row[self.columns.index("request_index")]))

    def column(self, name: str) -> np.ndarray:
        return self.rows[:, self.columns.index(name)]


class _Names(Log):
    """Also remembers the names of the columns."""

    def add_requests(self, columns) -> None:
        self.names = sorted(columns)
        super().add_requests(columns)


def run_cluster(
    chunk: RequestChunk, deployment: Deployment, *, config: EngineConfig = SMALL,
    others: Mapping[str, EngineConfig] | None = None, stepwise: bool = False, clients: int = 0,
    think: float = 0.0, seed: int = 0,
) -> Run:  # fmt: skip
    """Serve `chunk`, in a closed loop of `clients` if there are any, and check that everything adds up.

    `others` holds the settings of groups, by name, that have other ones than `config`.
    """
    log, ledger = _Names(), Ledger()
    log.names = []
    groups = []
    for group in deployment.groups:
        own = replace((others or {}).get(group.name, config), prefill_only=group.role == "prefill")
        plan = ReplicaPlan(own, None, compiled("gqa", own), attention_spans(tiny_model("gqa")), ParallelPlan())
        groups.append(GroupPlan(group, SCENARIO, plan))
    loop = ClosedLoop(ClosedLoopSource(iter([chunk]), clients, think), ingress=0.002, egress=0.001, block_size=BLOCK)

    def build(replica: Replica):
        return build_engine(replica.plan.plan, sinks=lambda rank: (log, ledger), stepwise=stepwise, chunk=64)

    cluster = Cluster(
        groups, deployment=deployment, seed=seed, build=build, on_finish=loop.on_finish if clients else None
    )  # fmt: skip
    sent = loop.run(cluster) if clients else run_open_loop(cluster, [chunk], ingress=0.002, block_size=BLOCK)
    engines = [engine for replica in cluster.replicas for engine in replica.schedulers]
    for engine in engines:
        engine.recorder.flush()
    check_conservation(
        engines, ledger, sent=sent, failed=cluster.failed, submitted_again=cluster.submissions - sent,
        unused_seconds=cluster.unused_seconds,
    )  # fmt: skip
    return Run(cluster, log, log.names)


def random_chunk(
    count: int, *, rate: float, seed: int = 1, branches: int = 0, sessions: int = 0, priorities: int = 1
) -> RequestChunk:
    """Poisson arrivals; with `branches` the prompts are paths in a tree of 64-token blocks."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(1, 400, count)
    hashes = None
    if branches:
        chosen = rng.integers(0, branches, count)
        hashes = [[b * 100 + i for i in range(-(-int(p) // 64))] for b, p in zip(chosen, prompts, strict=True)]
    return RequestChunk(
        np.cumsum(rng.exponential(1 / rate, count)), prompts, rng.integers(1, 120, count),
        rng.integers(0, priorities, count) if priorities > 1 else None, hashes,
        64 if hashes else 0, session_id=rng.integers(0, sessions, count) if sessions else None,
    )  # fmt: skip
