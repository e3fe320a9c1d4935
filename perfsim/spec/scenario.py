"""The one input type: everything a run depends on, resolved, frozen and hashable."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Self

from pydantic import Field

from perfsim.spec.base import Spec
from perfsim.spec.calibration import Calibration
from perfsim.spec.cluster import Cluster
from perfsim.spec.deployment import Deployment, ReplicaGroup
from perfsim.spec.hardware import Node
from perfsim.spec.model import ModelArch
from perfsim.spec.policy import SLO, ParallelPlan, ServingPolicy
from perfsim.spec.workload import Workload


class Scenario(Spec):
    """A resolved question: which model, on which node, run how, under which traffic, promised what.

    `cluster` holds many nodes like `hardware` and the network that joins them; without it nothing leaves the node.

    Every name is already looked up: descriptors and calibration coefficients are inlined, so two scenarios with equal
    `hash` give byte-identical results. `samples` is from how many draws of all factors bands are made, None for the
    first order.
    """

    name: str = "scenario"
    model: ModelArch
    hardware: Node
    cluster: Cluster | None = None
    parallel: ParallelPlan = ParallelPlan()
    policy: ServingPolicy = ServingPolicy()
    deployment: Deployment = Deployment()
    workload: Workload
    slo: SLO = SLO()
    calibration: Calibration
    seed: int = Field(default=0, ge=0, lt=2**63)
    samples: int | None = Field(default=None, ge=2, le=100_000)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The resolved scenario of a YAML file or of a packaged name; InputError when it is wrong."""
        from perfsim.spec.load import load_scenario

        return cls.model_validate(load_scenario(path))

    def replace(self, **changes: Any) -> Scenario:
        """This scenario with other values: `replace(seed=1, model="llama-2-7b-hf", **{"parallel.tp": 8})`.

        Keys are those of a scenario file, dotted inside a section, and values are written as there; descriptors are
        accepted where names are. What the engine chose by itself is chosen again. Raises InputError on a wrong key or
        value, InfeasibleError when the new hardware has too few GPUs.
        """
        from perfsim.spec.save import replaced

        return replaced(self, changes)

    @property
    def asynchronous(self) -> bool:
        """Whether batches are formed one step ahead.

        vLLM's V1 model runner does not with pipeline stages, nor with drafts that are looked up on the host.
        """
        speculative = self.policy.speculative
        on_host = speculative is not None and speculative.method == "ngram"
        return self.policy.async_scheduling and self.parallel.pp == 1 and not on_host

    def of_group(self, group: ReplicaGroup) -> Scenario:
        """The scenario of one replica of `group`, alone."""
        own = {key: getattr(group, key) for key in ("hardware", "parallel", "policy", "calibration")}
        given = {key: value for key, value in own.items() if value is not None}
        if given.get("hardware", self.hardware) != self.hardware:
            given["cluster"] = None
        return self.model_copy(update={**given, "deployment": Deployment()})

    def portable(self) -> dict[str, Any]:
        """This scenario as JSON values that are the same on every machine: of a trace's path, the file name is left."""
        content = self.model_dump(mode="json")
        if self.samples is None:
            content.pop("samples")
        if content["workload"].get("content_hash"):
            content["workload"]["trace"] = Path(content["workload"]["trace"]).name
        return content

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON of this scenario, without its name, the sources of facts and a trace's name."""
        content = self.portable()
        content.pop("name")
        if content["workload"].get("content_hash"):
            content["workload"].pop("trace")
        content["hardware"].pop("sources")
        content["hardware"]["accelerator"].pop("sources")
        if content["cluster"] is None:
            content.pop("cluster")
        else:  # its node is `hardware`
            content["cluster"] = {key: content["cluster"][key] for key in ("node_count", "network", "remote")}
        for group in content["deployment"]["groups"]:
            if group["hardware"] is not None:
                group["hardware"].pop("sources")
                group["hardware"]["accelerator"].pop("sources")
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()
