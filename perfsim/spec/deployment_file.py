"""A deployment as people write it: groups that name their hardware and give only what differs from the scenario."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from perfsim.errors import InfeasibleError, InputError
from perfsim.spec.base import Spec
from perfsim.spec.calibration import Calibration
from perfsim.spec.cluster import Cluster
from perfsim.spec.deployment import (
    Autoscaling,
    Deployment,
    Failures,
    KvTransfer,
    ReplicaGroup,
    Role,
    RoundRobin,
    Router,
)  # fmt: skip
from perfsim.spec.engine_defaults import check_parallel, resolve_policy
from perfsim.spec.engine_version import EngineVersion
from perfsim.spec.hardware import Node
from perfsim.spec.model import ModelArch
from perfsim.spec.policy import ParallelPlan, ServingPolicy
from perfsim.spec.problems import INLINE, NAME, validated


def name_or_inline(value: Any) -> str:
    """The tag of a reference: a name to look up, or the thing itself."""
    return INLINE if isinstance(value, (dict, Spec)) else NAME


HardwareRef = Annotated[
    Annotated[str, Tag(NAME)] | Annotated[Node, Tag(INLINE)],
    Discriminator(name_or_inline),
    Field(description="name of a node or accelerator (`perfsim list hardware`), or a whole descriptor"),
]


class GroupFile(Spec):
    """The YAML form of a ReplicaGroup: what is left out is the scenario's, in `policy` key by key."""

    name: str = Field(min_length=1, max_length=64)
    count: int = Field(gt=0, le=100_000)
    role: Role = "both"
    hardware: HardwareRef | None = None
    parallel: ParallelPlan | None = None
    policy: ServingPolicy | None = None
    engine: str | None = None
    engine_version: EngineVersion | None = None
    calibration: Calibration | None = None


class DeploymentFile(Spec):
    """The YAML form of a Deployment."""

    groups: tuple[GroupFile, ...] = (GroupFile(name="replica", count=1),)
    router: Router = RoundRobin()
    transfer: KvTransfer = KvTransfer()
    autoscaling: Autoscaling | None = None
    failures: Failures | None = None


def resolve_deployment(
    file: DeploymentFile, *, model: ModelArch, own: ReplicaGroup, policy: ServingPolicy, where: Callable[[str], str],
    node: Callable[[str, str | Node], Node], calibration: Callable[[Node, GroupFile], Calibration],
    cluster: Cluster | None = None,
) -> Deployment:  # fmt: skip
    """The deployment with every group's hardware, parallelism, policy and coefficients filled in.

    `own` holds the scenario's resolved settings, `policy` the unresolved one, because the engine's defaults differ
    between devices. Groups on the scenario's own hardware share its `cluster`. `node(place, reference)` and
    `calibration(node, group)` look up names. A deployment of nothing but defaults stays as it is: it means the
    scenario itself. Raises InputError or InfeasibleError with the group's place.
    """
    if file == DeploymentFile():
        return Deployment()
    groups = []
    for index, group in enumerate(file.groups):
        place = f"deployment.groups.{index}"
        given = own.hardware if group.hardware is None else node(f"{place}.hardware", group.hardware)
        hardware = Node.model_validate(given)
        parallel = group.parallel or ParallelPlan.model_validate(own.parallel)
        chosen = {key: getattr(group.policy, key) for key in group.policy.model_fields_set} if group.policy else {}
        try:
            check_parallel(parallel, model=model, node=hardware, cluster=cluster if group.hardware is None else None)
            resolved = resolve_policy(
                policy.model_copy(update=chosen), model=model, accelerator=hardware.accelerator
            )  # fmt: skip
        except InfeasibleError as error:
            raise InfeasibleError(f"{where(place)}: {error}", binding=error.binding) from None
        except InputError as error:
            raise InputError(f"{where(place)}: {error}") from None
        same_device = group.hardware is None and group.engine is None and group.engine_version is None
        coefficients = group.calibration or (own.calibration if same_device else calibration(hardware, group))
        groups.append(
            ReplicaGroup(name=group.name, count=group.count, role=group.role, hardware=hardware, parallel=parallel,
                         policy=resolved, calibration=coefficients)
        )  # fmt: skip
    _check_room(file, groups, cluster, where=where)
    content = {"groups": tuple(groups), "router": file.router, "transfer": file.transfer,
               "autoscaling": file.autoscaling, "failures": file.failures}  # fmt: skip
    return validated(Deployment, content, where=lambda at: where(f"deployment.{at}" if at else "deployment"))


def _check_room(
    file: DeploymentFile, groups: list[ReplicaGroup], cluster: Cluster | None, *, where: Callable[[str], str]
) -> None:
    """Raises InfeasibleError when the groups on the scenario's own hardware need more GPUs than its `cluster` has."""
    if cluster is None:
        return
    most = 0 if file.autoscaling is None else file.autoscaling.max_replicas
    needed = sum(
        max(group.count, most) * group.parallel.gpus
        for group, given in zip(groups, file.groups, strict=True)
        if group.parallel is not None and given.hardware is None
    )
    if needed > cluster.accelerator_count:
        raise InfeasibleError(
            f"{where('deployment')}: {needed} GPUs do not fit: {cluster.name} has {cluster.accelerator_count}"
            " accelerators",
            binding="accelerators",
        )
