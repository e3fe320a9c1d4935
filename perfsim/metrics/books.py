"""The books of one simulation: a sink for everything that is recorded, checked and closed at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from perfsim.metrics.aggregate import Aggregate
from perfsim.metrics.offload import offload_metrics
from perfsim.metrics.summary import GroupUse, Outcome
from perfsim.metrics.usage import Usage, mean_batch
from perfsim.serving.check import BookkeepingError, Ledger, check_conservation
from perfsim.serving.explain import Explanation
from perfsim.serving.trace import lane_label

if TYPE_CHECKING:
    from perfsim.metrics.aggregate import Aggregated
    from perfsim.metrics.requests_table import ParquetSpool
    from perfsim.serving.cluster import Cluster
    from perfsim.serving.fleet import Replica
    from perfsim.serving.front import EngineFront
    from perfsim.serving.recorder import Columns, Sink
    from perfsim.serving.replica import GroupPlan
    from perfsim.serving.service import Served
    from perfsim.serving.trace import Trace
    from perfsim.spec.scenario import Scenario

# The explaining form of the cost model and the compiled one are the same formulas; more than rounding is a bug.
MAX_MISMATCH = 1e-6
# A segment counts who is in the engine at its start: a request may arrive during a step, wait for the batch already
# formed, and keep its slot for one step after its end.
UNSEEN_STEPS = 3.0


class Books:
    """Metrics, explanation and conservation of one simulation; `spool` receives a row per finished request."""

    def __init__(self, scenario: Scenario, groups: Sequence[GroupPlan], *, egress: float, trace: Trace | None) -> None:
        self.aggregate = Aggregate(slo=scenario.slo, egress=egress)
        self.spool: ParquetSpool | None = None
        self._groups = groups
        self._trace = trace
        self._egress = egress
        self._ledger = Ledger()
        self._explanations = {
            plan.group.name: Explanation(plan.scenario, windows=len(plan.plan.windows)) for plan in groups
        }
        self._usages: dict[str, list[Usage]] = {}

    def sinks(self, replica: Replica, rank: int | None = None) -> tuple[Sink, ...]:
        """What one scheduler of a replica records goes here; `rank` is that of a data-parallel one."""
        config = replica.plan.plan.config
        usage = self.aggregate.usage(kv_blocks=config.total_blocks, block_size=config.block_size)
        self._usages.setdefault(replica.name, []).append(usage)
        found: list[Sink] = [usage, _Requests(self), self._explanations[replica.plan.group.name], self._ledger]
        if self._trace is not None:
            lane = lane_label(replica.plan.scenario.parallel, dp_rank=rank)
            found.append(self._trace.replica(replica.name, lane=lane))
        return tuple(found)

    def close(self, served: Served) -> Outcome:
        """Check everything and hand it over; BookkeepingError when the simulation contradicts itself."""
        cluster = served.cluster
        engines = [engine for replica in served.replicas for engine in replica.schedulers]
        failed = again = 0
        unused = 0.0
        if cluster is not None:
            failed, again = cluster.failed, cluster.submissions - served.sent
            unused = cluster.unused_seconds
        check_conservation(
            engines, self._ledger, sent=served.sent, failed=failed, submitted_again=again, unused_seconds=unused
        )
        mismatch = max(explanation.mismatch for explanation in self._explanations.values())
        if mismatch > MAX_MISMATCH:
            raise BookkeepingError(f"explained and simulated step times differ by {mismatch:.2e}")
        rejected: dict[str, int] = {}
        for engine in engines:
            for reason, count in engine.recorder.rejected.items():
                rejected[reason] = rejected.get(reason, 0) + count
        self.aggregate.add_rejected(rejected)
        self.aggregate.add_failed(failed)
        aggregated = self.aggregate.finish()
        law = aggregated.littles_law
        # A batch is in flight for a step per stage.
        unseen = UNSEEN_STEPS * self._groups[0].scenario.parallel.pp
        whole = not any(engine.lost_seconds for engine in engines)  # else some who were there have no row
        if cluster is None and whole and law is not None and not law.holds(steps=unseen):
            raise BookkeepingError(f"Little's law: {law.from_segments} by segments, {law.from_requests} by requests")
        rows = () if cluster is None else tuple(self._row(replica, aggregated) for replica in served.replicas)
        return Outcome(
            aggregated,
            tuple(self._use(plan, served, aggregated) for plan in self._groups),
            rejected=rejected,
            backlog=_waiting_at(aggregated.timeline, self._ledger.last_arrival),
            replicas=rows,
            service=({} if cluster is None else service_metrics(cluster))
            | speculation_metrics(engines, self._ledger)
            | offload_metrics(engines, prompt_tokens=aggregated.metrics["counts"]["prompt_tokens"]),
            notes=served.notes,
        )

    def _span(self) -> tuple[float, float]:
        return self.aggregate.first_arrival, self.aggregate.last_finish + self._egress

    def _use(self, plan: GroupPlan, served: Served, aggregated: Aggregated) -> GroupUse:
        explained = self._explanations[plan.group.name]
        replicas = [replica for replica in served.replicas if replica.plan is plan]
        powered = None
        if served.cluster is not None and aggregated.makespan_s is not None:
            powered = sum(replica.powered_seconds(*self._span()) for replica in replicas)
        return GroupUse(
            plan.scenario, plan.plan.memory, len(replicas), powered, explained.seconds, explained.bound,
            explained.joules,
        )  # fmt: skip

    def _row(self, replica: Replica, aggregated: Aggregated) -> dict[str, Any]:
        """One row of `Result.replicas`."""
        usages, engines = self._usages[replica.name], replica.schedulers
        powered = replica.powered_seconds(*self._span()) if aggregated.makespan_s is not None else 0.0
        saved = sum(engine.saved_tokens for engine in engines)
        seen = saved + sum(usage.prefill_tokens for usage in usages)
        busy = max(usage.busy_s for usage in usages)
        return {
            "name": replica.name,
            "group": replica.plan.group.name,
            "role": replica.plan.group.role,
            "requests": replica.dispatched,
            "output_tokens": sum(usage.output_tokens for usage in usages),
            "busy_fraction": busy / powered if powered else 0.0,
            "mean_batch": mean_batch(usages),
            "kv_peak_fraction": max(usage.peak["kv_blocks"] / usage.kv_blocks for usage in usages),
            "prefix_hit_rate": saved / seen if seen else None,
            "preemptions": sum(engine.preemptions for engine in engines),
            "failures": replica.failures,
            "powered_s": powered,
        }


class _Requests:
    """A sink for what only requests and their token gaps say."""

    def __init__(self, books: Books) -> None:
        self._books = books

    def add_requests(self, columns: Columns) -> None:
        self._books.aggregate.add_requests(columns)
        if self._books.spool is not None:
            self._books.spool.add(columns)

    def add_segments(self, columns: Columns) -> None: ...

    def add_gaps(self, seconds: Any, weights: Any) -> None:
        self._books.aggregate.add_gaps(seconds, weights)


def speculation_metrics(engines: Sequence[EngineFront], ledger: Ledger) -> dict[str, Any]:
    """How drafts fared, accepted ones beyond the end of a request included, as vLLM counts; empty without drafts."""
    if not ledger.drafts:
        return {}
    accepted = ledger.accepted + sum(engine.cut_off_tokens for engine in engines)
    return {
        "speculation": {
            "mean_acceptance_length": 1.0 + accepted / ledger.verifications,
            "accepted_fraction": accepted / ledger.drafts,
            "draft_tokens": ledger.drafts,
        }
    }


def service_metrics(cluster: Cluster) -> dict[str, Any]:
    """What only a cluster has: retries, scaling, transfers of K/V, events on SimPy's clock."""
    found: dict[str, Any] = {"service": {"retries": cluster.retried, "events": cluster.env.events}}
    if cluster.autoscaler is not None:
        found["service"] |= {"replicas_started": cluster.autoscaler.started,
                             "replicas_drained": cluster.autoscaler.drained}  # fmt: skip
    handover = cluster.handover
    if handover is not None:
        moved = handover.moved
        found["kv_transfer"] = {
            "transfers": moved,
            "bytes": handover.bytes,
            "mean_s": handover.seconds / moved if moved else None,
            "mean_wait_s": handover.waited / moved if moved else None,
            "bytes_per_s": handover.exposed / handover.seconds if handover.seconds else None,
        }
    return found


def _waiting_at(timeline: dict[str, Any], at: float) -> float:
    """Requests waiting at time `at`, read off the timeline."""
    waiting = timeline["waiting"]
    if not waiting:
        return 0.0
    index = int((at - timeline["start_s"]) / timeline["bin_s"])
    return float(waiting[min(max(index, 0), len(waiting) - 1)])
