"""What a machine is: accelerators, memory tiers, links and the node that holds them. Facts only, no physics."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

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


class Link(Spec):
    """A connection out of one accelerator: `bandwidth` is bytes/s per direction, `latency` one hop in seconds."""

    kind: Literal["nvlink", "xgmi", "hccs", "pcie", "infiniband", "ethernet"]
    bandwidth: Bandwidth
    latency: Seconds
    switched: bool = Field(description="all-to-all through a switch at full rate, rather than a shared host path")


class Accelerator(Spec):
    """One GPU as its datasheet describes it.

    `peak_flops` holds dense rates (never sparse) per dtype; a missing dtype is one the matrix units do not support.
    `sources` maps a field (`peak_flops.bf16`, `memory.read_bandwidth`) to its Fact.
    """

    name: str
    label: str
    vendor: str
    sm_count: int = Field(gt=0)
    boost_clock: Hertz
    peak_flops: dict[DType, FlopRate]
    memory: MemoryTier
    l2_bytes: Bytes
    sram_per_sm_bytes: Bytes
    tdp: Watts
    idle_power: Watts
    price_per_hour: float | None = Field(
        ge=0, description="US dollars per GPU and hour; None when nothing is published"
    )
    release_year: int
    sources: dict[str, Fact] = Field(default_factory=dict)


class Node(Spec):
    """One server: `accelerator_count` equal GPUs, the link among them, the host around them.

    `host_power` is what the node draws beyond its GPUs (CPU, DRAM, NIC, fans) while it is on.
    """

    name: str
    label: str
    accelerator: Accelerator
    accelerator_count: int = Field(gt=0)
    scale_up: Link
    host_link: Link
    dram: MemoryTier | None
    host_power: Watts
    sources: dict[str, Fact] = Field(default_factory=dict)
