"""What the cost model says about a measured row: by the algorithms its backend has, and by the fastest of all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from perfsim.cost.collective import fastest_algorithm
from perfsim.cost.speed_of_light import collective_seconds
from perfsim.cost.topology import Fabric, fabric
from perfsim.spec import catalog
from perfsim.spec.calibration import DeviceEfficiency
from perfsim.spec.cluster import Cluster, FatTree
from perfsim.spec.curves import OperatorCurves
from perfsim.spec.load import find_calibration
from validation.collectives.rows import Row

# NCCL has no direct algorithms for reductions inside a node; its broadcast and gathers are rings, its all-to-all sends
# to one peer after the other. None: whatever is fastest.
ALLOWED = {
    "nccl": {"ring", "tree", "nvls", "nvls_tree", "direct", "pairwise", "forward"},
    "nccl torch": {"ring", "tree", "nvls", "nvls_tree", "direct", "pairwise", "forward"},
    "nccl ring": {"ring"},
    "nccl nvls": {"nvls", "nvls_tree"},
    "nccl nvls_tree": {"nvls_tree"},
}
GATHERS = ("all_gather", "reduce_scatter")


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds and algorithm that the model predicts for a backend, and the bound that nothing can beat."""

    seconds: float
    algorithm: str
    bound: float


def predict(row: Row, *, curves: bool = False) -> Prediction:
    """The prediction for one row, with the coefficients of `hardware/calibration/first-guess.yaml`.

    `curves` adds those that were fitted to such rows: what perfsim predicts for a served model.
    """
    links, efficiency = network(row.node, row.nodes), _efficiency(row.node, curves)
    allowed = ALLOWED.get(row.backend)
    if allowed is not None and row.work.kind in GATHERS:
        allowed = {"ring"}
    name, seconds = fastest_algorithm(row.work, links, efficiency, allowed=allowed)
    return Prediction(float(seconds), str(name), float(collective_seconds(row.work, links)))


@cache
def network(node_name: str, nodes: int) -> Fabric:
    """`nodes` of these nodes on one layer of switches: all measured machines are small enough for that."""
    node = catalog.node(node_name)
    if nodes == 1:
        return fabric(node)
    switches = FatTree(rail_optimised=True, radix=64, levels=1, hop_latency=0.0)
    return fabric(node, Cluster(name=node_name, label="", node=node, node_count=nodes, network=switches))


@cache
def _efficiency(node_name: str, curves: bool) -> DeviceEfficiency:
    device = find_calibration(accelerator=catalog.node(node_name).accelerator.name, engine="vllm").device
    return device if curves else device.model_copy(update={"curves": OperatorCurves()})
