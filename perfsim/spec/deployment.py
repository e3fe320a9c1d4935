"""How replicas make a service: groups of equal replicas, the router in front, transfers, scaling and failures."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from perfsim.spec.base import Bandwidth, Seconds, Spec
from perfsim.spec.calibration import Calibration
from perfsim.spec.hardware import Node
from perfsim.spec.policy import ParallelPlan, ServingPolicy

Role = Literal["both", "prefill", "decode"]


class ReplicaGroup(Spec):
    """`count` equal replicas that play one `role`; what is None is that of the scenario (the loader fills it in)."""

    name: str = Field(min_length=1, max_length=64)
    count: int = Field(gt=0, le=100_000)
    role: Role = "both"
    hardware: Node | None = None
    parallel: ParallelPlan | None = None
    policy: ServingPolicy | None = None
    calibration: Calibration | None = None


class RoundRobin(Spec):
    """Replicas take turns."""

    kind: Literal["round_robin"] = "round_robin"


class LeastLoaded(Spec):
    """The replica with the fewest requests in it; the first one of equals."""

    kind: Literal["least_loaded"] = "least_loaded"


class PowerOfTwo(Spec):
    """The less loaded of two replicas drawn at random (Mitzenmacher, IEEE TPDS 12(10), 2001)."""

    kind: Literal["power_of_two"] = "power_of_two"


class PrefixAware(Spec):
    """The replica that most probably caches the longest prefix, unless the load is out of balance.

    The policy of SGLang's cache-aware router: the longest match wins when it covers at least `match_threshold` of the
    prompt, else the least loaded replica; when the loads differ by more than `balance_abs` requests and by the factor
    `balance_rel`, the least loaded one regardless of matches. The router remembers the most recent `tree_tokens` tokens
    of every replica; SGLang's default, recalled, is 2^24 characters, at about four characters per token.
    """

    kind: Literal["prefix_aware"] = "prefix_aware"
    tree_tokens: int = Field(default=1 << 22, gt=0)
    match_threshold: float = Field(default=0.3, ge=0, le=1)
    balance_abs: int = Field(default=64, ge=0)
    balance_rel: float = Field(default=1.5, ge=1)


class SessionSticky(Spec):
    """A session stays on the replica that served its first turn; a request without one goes to the least loaded."""

    kind: Literal["session"] = "session"


Router = Annotated[RoundRobin | LeastLoaded | PowerOfTwo | PrefixAware | SessionSticky, Field(discriminator="kind")]


class KvTransfer(Spec):
    """How K/V move from a prefill to a decode replica: per GPU `bandwidth` bytes/s each way, `latency` per request.

    None takes the network of the scenario's hardware. `layerwise` sends a layer as soon as it is computed, so that only
    what the prefill does not hide remains.
    """

    bandwidth: Bandwidth | None = None
    latency: Seconds | None = None
    layerwise: bool = False


class Autoscaling(Spec):
    """Keep requests in flight per replica near `target`, checked every `interval`.

    The wanted number is ceil(in flight / target), as in Kubernetes' horizontal autoscaler; a new replica serves after
    `startup_delay`, a surplus one is drained first and only after `scale_down_delay` of continuous surplus.
    """

    target: float = Field(gt=0)
    min_replicas: int = Field(default=1, gt=0)
    max_replicas: int = Field(gt=0, le=100_000)
    interval: Annotated[Seconds, Field(gt=0)] = 15.0
    startup_delay: Seconds = 60.0
    scale_down_delay: Seconds = 300.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas ({self.max_replicas}) must be at least min_replicas ({self.min_replicas})")
        return self


class Failures(Spec):
    """Replicas fail with exponential times of mean `mtbf` each and are back after `repair`.

    What was in a failed replica is sent again by the router, from the first token, at most `max_retries` times; a
    request that has used them up counts as failed.
    """

    mtbf: Annotated[Seconds, Field(gt=0)]
    repair: Seconds = 300.0
    max_retries: int = Field(default=3, ge=0)


class Deployment(Spec):
    """The service: groups of replicas behind one router. One replica of the scenario's own settings when left out.

    With a `prefill` group there must be a `decode` group and no group of role `both`. Autoscaling acts on the only
    group of role `both`.
    """

    groups: tuple[ReplicaGroup, ...] = (ReplicaGroup(name="replica", count=1),)
    router: Router = RoundRobin()
    transfer: KvTransfer = KvTransfer()
    autoscaling: Autoscaling | None = None
    failures: Failures | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [group.name for group in self.groups]
        if not names or len(set(names)) < len(names):
            raise ValueError("groups need distinct names, and there must be one")
        roles = {group.role for group in self.groups}
        if roles not in ({"both"}, {"prefill", "decode"}):
            raise ValueError("roles must be all 'both', or 'prefill' and 'decode'")
        if self.transfer != KvTransfer() and roles == {"both"}:
            raise ValueError("transfer is between groups of role 'prefill' and 'decode', there are none")
        scaling = self.autoscaling
        if scaling is not None and (len(self.groups) > 1 or roles != {"both"}):
            raise ValueError("autoscaling needs one group of role 'both'")
        if scaling is not None and not scaling.min_replicas <= self.groups[0].count <= scaling.max_replicas:
            raise ValueError(
                f"autoscaling starts with the count of its group, which must be in {scaling.min_replicas} to"
                f" {scaling.max_replicas}, got {self.groups[0].count}"
            )
        return self

    @property
    def disaggregated(self) -> bool:
        return any(group.role == "prefill" for group in self.groups)

    @property
    def single(self) -> bool:
        """Whether this is one replica and nothing else."""
        alone = len(self.groups) == 1 and self.groups[0].count == 1
        return alone and self.autoscaling is None and self.failures is None
