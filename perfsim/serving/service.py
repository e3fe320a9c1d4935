"""A deployment under its workload: the engine or cluster that serves it, and the driver that feeds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from perfsim.serving.driver import ClosedLoop, run_open_loop
from perfsim.serving.fleet import SERVING, Replica
from perfsim.serving.lockstep import LockstepGroup
from perfsim.serving.replica import GroupPlan, build_engine
from perfsim.serving.sessions import Sessions
from perfsim.serving.stages import Staged
from perfsim.serving.trace import draw_tier
from perfsim.spec import catalog
from perfsim.spec.workload import StagedArrivals
from perfsim.traffic import closed_loop_source, is_closed_loop, is_conversation, session_source, stream

if TYPE_CHECKING:
    from perfsim.serving.cluster import Cluster
    from perfsim.serving.driver import Progress
    from perfsim.serving.recorder import Sink
    from perfsim.serving.request import Request
    from perfsim.serving.trace import Trace
    from perfsim.spec.scenario import Scenario

# Segments that all recorders together hold before they hand them over: bounds the memory of many replicas.
_BUFFERED = 1 << 18
_MOST, _LEAST = 1 << 16, 1 << 10


@dataclass(frozen=True, slots=True)
class Served:
    """What served: its replicas, the cluster around them unless there is one replica alone, and requests sent.

    `notes` are warnings about the traffic.
    """

    replicas: list[Replica]
    cluster: Cluster | None
    sent: int
    notes: tuple[str, ...] = ()


def serve(
    scenario: Scenario, groups: Sequence[GroupPlan], *, sinks: Callable[[Replica, int | None], tuple[Sink, ...]],
    progress: Progress | None = None, stepwise: bool = False, trace: Trace | None = None,
    begin: Callable[[float], None] | None = None, clustered: bool | None = None,
) -> Served:  # fmt: skip
    """Serve all requests of the scenario. `sinks(replica)` receive what a replica records.

    `begin(seconds)` is told when the first request reaches a cluster or a lock-step group, before anything is recorded.

    One replica alone needs no clock but its own; `clustered` puts it behind a router all the same, or says that it
    must not be.
    """
    deployment = scenario.deployment
    if clustered is None:
        clustered = not deployment.single
    count = sum(group.group.count for group in groups)
    chunk = max(_LEAST, min(_MOST, _BUFFERED // count))
    made: list[Any] = []

    def build(replica: Replica) -> Any:
        engine = build_engine(replica.plan.plan, sinks=partial(sinks, replica), stepwise=stepwise, chunk=chunk)
        if trace is not None:
            for rank, scheduler in enumerate(engine.ranks if isinstance(engine, LockstepGroup) else (engine,)):
                if scheduler.offload is not None:
                    several = f" DP {rank}" if isinstance(engine, LockstepGroup) else ""
                    scheduler.offload.tier.draw = draw_tier(trace, replica.name + several)
        return engine

    def server(on_finish: Callable[[Request, float], None] | None) -> Any:
        if clustered:
            from perfsim.serving.cluster import Cluster  # SimPy is not needed for one replica

            made.append(Cluster(groups, deployment=deployment, seed=scenario.seed, build=build, on_finish=on_finish,
                                trace=trace, begin=begin))  # fmt: skip
            return made[0]
        made.append(_alone(groups[0], build, begin=begin, on_finish=on_finish))
        return made[0].engine

    sent, notes = _drive(scenario, groups[0], server, progress)
    cluster = made[0] if clustered else None
    replicas = cluster.replicas if cluster is not None else [made[0]]
    for replica in replicas:
        for scheduler in replica.schedulers:
            scheduler.recorder.flush()
    return Served(replicas, cluster, sent, notes)


def _alone(
    group: GroupPlan, build: Callable[[Replica], Any], *, begin: Callable[[float], None] | None,
    on_finish: Callable[[Request, float], None] | None,
) -> Replica:  # fmt: skip
    """The only replica of a deployment, which serves from the start."""
    replica = Replica(0, group.group.name, 0, group)
    replica.enter(SERVING, 0.0)
    replica.engine = build(replica)
    if isinstance(replica.engine, LockstepGroup):
        replica.engine.begin = begin
    for scheduler in replica.schedulers:
        scheduler.on_finish = on_finish
    return replica


def _drive(
    scenario: Scenario, group: GroupPlan, server: Callable[[Callable[[Request, float], None] | None], Any],
    progress: Progress | None,
) -> tuple[int, tuple[str, ...]]:  # fmt: skip
    """Feed `server(hook)`, an engine or what looks like one; (requests sent, what to know about them)."""
    profile, config = scenario.calibration.engine, group.plan.config
    times = {"ingress": profile.ingress, "egress": profile.egress}
    workload, seed, lora = scenario.workload, scenario.seed, scenario.policy.lora
    if is_conversation(workload):
        conversations = session_source(workload, seed=seed, max_context=config.max_model_len, lora=lora)
        sessions = Sessions(conversations, block_size=config.block_size, **times)
        return sessions.run(server(sessions.on_finish), progress=progress), sessions.notes()
    if is_closed_loop(workload):
        source = closed_loop_source(workload, seed=seed, trace_path=catalog.trace_path, lora=lora)
        loop = ClosedLoop(source, block_size=config.block_size, **times)
        return loop.run(server(loop.on_finish), progress=progress), ()
    chunks = stream(workload, seed=seed, trace_path=catalog.trace_path, lora=lora)
    if isinstance(workload.arrivals, StagedArrivals):
        staged = Staged(workload.arrivals, chunks, block_size=config.block_size, **times)
        return staged.run(server(staged.on_finish), progress=progress), ()
    sent = run_open_loop(
        server(None), chunks, ingress=profile.ingress, block_size=config.block_size, progress=progress
    )  # fmt: skip
    return sent, ()
