"""A scenario as people write it: names instead of descriptors, defaults left out."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from perfsim.spec.base import Spec
from perfsim.spec.calibration import Calibration
from perfsim.spec.cluster import Cluster
from perfsim.spec.deployment_file import DeploymentFile, name_or_inline
from perfsim.spec.engine_version import EngineVersion
from perfsim.spec.hardware import Node
from perfsim.spec.model import ModelArch
from perfsim.spec.policy import SLO, ParallelPlan, ServingPolicy
from perfsim.spec.problems import CLUSTER, INLINE, NAME
from perfsim.spec.workload import Workload

DEFAULT_ENGINE = "vllm"

ModelRef = Annotated[
    Annotated[str, Tag(NAME)] | Annotated[ModelArch, Tag(INLINE)],
    Discriminator(name_or_inline),
    Field(description="name (`perfsim list models`), Hugging Face id, path of a config.json, or a whole descriptor"),
]


def _machine(value: Any) -> str:
    """The tag of a machine: a cluster is what has a `node`."""
    if isinstance(value, Cluster) or (isinstance(value, dict) and "node" in value):
        return CLUSTER
    return name_or_inline(value)


MachineRef = Annotated[
    Annotated[str, Tag(NAME)] | Annotated[Node, Tag(INLINE)] | Annotated[Cluster, Tag(CLUSTER)],
    Discriminator(_machine),
    Field(description="name of a node, accelerator or cluster (`perfsim list hardware`), or a whole descriptor"),
]


class ScenarioFile(Spec):
    """The YAML form of a Scenario; `load_scenario` resolves it.

    `model` and `hardware` are names or whole descriptors. `engine` names the profile of engine overheads,
    `engine_version` chooses among its kernels where several versions were timed.
    `calibration` is normally looked up for the device and engine; it stands in the file only when it cannot be.
    """

    name: str = Field(default="scenario", min_length=1, max_length=200)
    model: ModelRef
    hardware: MachineRef
    parallel: ParallelPlan = ParallelPlan()
    policy: ServingPolicy = ServingPolicy()
    deployment: DeploymentFile = DeploymentFile()
    workload: Workload
    slo: SLO = SLO()
    engine: str = Field(default=DEFAULT_ENGINE, description="engine profile, from hardware/calibration")
    engine_version: EngineVersion | None = None
    calibration: Calibration | None = None
    seed: int = Field(default=0, ge=0, lt=2**63)
    samples: int | None = Field(default=None, ge=2, le=100_000, description="draws that bands are made of")
