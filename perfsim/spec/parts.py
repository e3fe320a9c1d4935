"""What machines are built of: kinds of links and of storage, as their makers or measurements describe them.

Nodes and clusters spell out the values that they use; these descriptors are for reading and for what-if machines.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from perfsim.spec.base import Bandwidth, Bytes, Seconds, Spec
from perfsim.spec.hardware import Fact, LinkKind


class LinkType(Spec):
    """One generation of a link; None is a value that nobody publishes.

    `bandwidth` is the line rate in bytes/s per direction of all `lanes` of one device (lanes, links or ports),
    `effective_bandwidth` what bulk transfers reach, `latency` that of one hop in seconds. `measured` holds further
    published bandwidths.
    """

    name: str
    label: str
    kind: LinkKind | Literal["cxl"]
    bandwidth: Bandwidth
    lanes: int | None = Field(default=None, gt=0)
    effective_bandwidth: Bandwidth | None = None
    latency: Seconds | None = None
    measured: dict[str, Bandwidth] = Field(default_factory=dict)
    sources: dict[str, Fact] = Field(default_factory=dict)


class Storage(Spec):
    """One kind of memory or store beyond HBM; None is a value that nobody publishes.

    Bandwidths are bytes/s of one device (of an object store or file system: of everything one client or job gets),
    `latency` is that of one small read in seconds, `read_rate` and `write_rate` are requests/s. `per_connection` is
    what one request stream gets.
    """

    name: str
    label: str
    kind: Literal["dram", "cxl", "ssd", "computational_storage", "object_store", "parallel_file_system"]
    capacity: Bytes | None = None
    read_bandwidth: Bandwidth | None = None
    write_bandwidth: Bandwidth | None = None
    latency: Seconds | None = None
    read_rate: float | None = Field(default=None, gt=0)
    write_rate: float | None = Field(default=None, gt=0)
    per_connection: Bandwidth | None = None
    measured: dict[str, Bandwidth] = Field(default_factory=dict)
    sources: dict[str, Fact] = Field(default_factory=dict)
