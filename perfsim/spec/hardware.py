"""What a machine is: accelerators, memory tiers, links and the node that holds them. Facts only, no physics."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from perfsim.spec.base import Bandwidth, Bytes, FlopRate, Hertz, Seconds, Spec, Watts

DType = Literal["fp64", "fp32", "tf32", "fp16", "bf16", "fp8", "int8", "fp4"]


class Fact(Spec):
    """Where one value comes from; `verified` is False for a value recalled, guessed or computed by hand."""

    source: str
    verified: bool = True
    note: str = ""


class MemoryTier(Spec):
    """One level of memory: capacity in bytes, bandwidths in bytes/s, latency in seconds."""

    kind: Literal["hbm", "gddr", "dram", "cxl", "ssd", "remote"]
    capacity: Bytes
    read_bandwidth: Bandwidth
    write_bandwidth: Bandwidth
    latency: Seconds = 0.0


LinkKind = Literal["nvlink", "xgmi", "hccs", "ici", "pcie", "infiniband", "ethernet", "slingshot"]


class Link(Spec):
    """A connection out of one accelerator: `bandwidth` is bytes/s per direction over all ports, `latency` of one hop.

    `topology` says how equal accelerators are joined: `switched` (any to any at full rate), `mesh` (one fixed share of
    the bandwidth to each peer of the node), `torus` (two neighbours along each of `dimensions`), `host` (a path through
    the host that is no faster to many peers than to one). `in_switch_reduction`: the switches add and copy messages
    (NVLink SHARP of third-generation NVSwitches), so that an all-reduce sends its vector once.
    """

    kind: LinkKind
    bandwidth: Bandwidth
    latency: Seconds
    topology: Literal["switched", "mesh", "torus", "host"]
    dimensions: int = Field(default=0, ge=0, le=6)
    in_switch_reduction: bool = False
    switches: int | None = Field(default=None, gt=0, description="switch chips that join one node")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.topology == "torus") != (self.dimensions > 0):
            raise ValueError("dimensions goes with topology torus, and only with it")
        if self.in_switch_reduction and self.topology != "switched":
            raise ValueError("in_switch_reduction needs topology switched")
        return self


class NetworkCards(Spec):
    """`count` equal network cards of one node, shared evenly by its accelerators.

    `bandwidth` is bytes/s per card and direction, `latency` from one card to another through one switch.
    """

    kind: LinkKind
    count: int = Field(gt=0)
    bandwidth: Bandwidth
    latency: Seconds


class HostCpu(Spec):
    """The processors of one node; they carry no cost of their own here."""

    model: str
    sockets: int = Field(gt=0)
    cores: int = Field(gt=0)


class Drives(Spec):
    """The local drives of one node: capacity in bytes and bandwidths in bytes/s, of all together; None is unknown."""

    count: int | None = Field(default=None, gt=0)
    capacity: Bytes | None = None
    read_bandwidth: Bandwidth | None = None
    write_bandwidth: Bandwidth | None = None


class Accelerator(Spec):
    """One GPU, or another accelerator, as its datasheet describes it; None is a value that nobody publishes.

    `peak_flops` holds dense rates (never sparse) per dtype; a missing dtype is one the matrix units do not support.
    `sm_count` counts what schedules independently: SMs, compute units, TensorCores of a TPU, cores of a CPU. Without
    `tdp` and `idle_power` energy is unknown; all else is simulated.
    `sources` maps a field (`peak_flops.bf16`, `memory.read_bandwidth`) to its Fact.
    """

    name: str
    label: str
    vendor: str
    sm_count: int | None = Field(gt=0)
    boost_clock: Hertz | None
    peak_flops: dict[DType, FlopRate]
    memory: MemoryTier
    l2_bytes: Bytes | None
    sram_per_sm_bytes: Bytes | None
    tdp: Watts | None
    idle_power: Watts | None
    price_per_hour: float | None = Field(
        ge=0, description="US dollars per GPU and hour; None when nothing is published"
    )
    release_year: int
    sources: dict[str, Fact] = Field(default_factory=dict)

    @property
    def dynamic_power(self) -> float | None:
        """Watts that work can add to an idle accelerator; None when its TDP or idle power is unknown."""
        return None if self.tdp is None or self.idle_power is None else max(0.0, self.tdp - self.idle_power)


class Node(Spec):
    """One scale-up domain: `accelerator_count` equal GPUs, the link among them, the host around them.

    Usually that is a server; a rack whose switches join all its GPUs, as an NVL72, is one node too. `host_power` is
    what the node draws beyond its GPUs (CPU, DRAM, NIC, fans) while it is on; `max_power` is its nameplate;
    `measured` holds published bandwidths that nothing computes with.
    """

    name: str
    label: str
    accelerator: Accelerator
    accelerator_count: int = Field(gt=0)
    scale_up: Link
    host_link: Link
    dram: MemoryTier | None
    host_power: Watts
    nics: NetworkCards | None = None
    cpu: HostCpu | None = None
    drives: Drives | None = None
    max_power: Watts | None = None
    measured: dict[str, Bandwidth] = Field(default_factory=dict)
    sources: dict[str, Fact] = Field(default_factory=dict)
