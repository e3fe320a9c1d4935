"""What moving a prompt's K/V from one replica to another takes: bytes, and the links they go over."""

from __future__ import annotations

from dataclasses import dataclass

from perfsim.cost.topology import network_tiers
from perfsim.errors import InputError
from perfsim.ops.cache import bounded_bytes, growing_bytes
from perfsim.ops.params import state_bytes_per_sequence
from perfsim.spec.deployment import KvTransfer
from perfsim.spec.scenario import Scenario


@dataclass(frozen=True, slots=True)
class TransferModel:
    """One replica's side: `bandwidth` bytes/s per direction of all its GPUs, `cap` of those that hold one sequence.

    `per_token` bytes for every token, `bounded` (bytes per token, at most so many tokens) for layers with a window,
    `fixed` per sequence for recurrent states; `latency` seconds.
    """

    bandwidth: float
    cap: float
    latency: float
    layers: int
    per_token: float
    bounded: tuple[tuple[float, int], ...]
    fixed: float

    def bytes(self, tokens: int) -> float:
        """Bytes that the cache of a prompt of `tokens` tokens occupies on all GPUs of the replica together."""
        if not tokens:
            return 0.0
        windows = sum(entry * min(tokens, limit) for entry, limit in self.bounded)
        return self.per_token * tokens + windows + self.fixed


def transfer_model(scenario: Scenario, spec: KvTransfer, *, gpus_in_use: float) -> TransferModel:
    """The transfer side of a replica of `scenario`.

    Every GPU fetches what it will hold, so copies (an MLA latent, a K/V head on several GPUs) are sent once each. A
    rate that `spec` does not give is that of the scale-up links when all `gpus_in_use` GPUs of the deployment fit one
    node (a rack whose switches join them is one; inf when groups differ in hardware), else the top tier of the
    cluster's network, else the node's network cards, shared evenly by its GPUs. Neglected: headers, and that fewer and
    larger messages are faster. Raises InputError when the hardware names no network.
    """
    model, node, tp = scenario.model, scenario.hardware, scenario.parallel.tp
    bandwidth, latency = spec.bandwidth, spec.latency
    if bandwidth is None or latency is None:
        if gpus_in_use <= node.accelerator_count:
            own, hop = node.scale_up.bandwidth, node.scale_up.latency
        elif scenario.cluster is not None and (tiers := network_tiers(scenario.cluster)):
            own, hop = tiers[-1].bandwidth, tiers[-1].latency
        elif node.nics is not None:
            own, hop = node.nics.bandwidth * node.nics.count / node.accelerator_count, node.nics.latency
        else:
            raise InputError(
                f"deployment.transfer: expected bandwidth and latency, because {node.name} names no network cards"
            )
        bandwidth, latency = own if bandwidth is None else bandwidth, hop if latency is None else latency
    dtype = scenario.policy.kv_cache_dtype
    growing, bounded = 0.0, []
    for group in model.layers:
        growing += group.count * growing_bytes(model, group, tp=tp, kv_cache_dtype=dtype)
        limit, entry = bounded_bytes(model, group.attention, tp=tp, kv_cache_dtype=dtype)
        if limit:
            bounded.append((tp * group.count * entry, limit))
    return TransferModel(
        bandwidth=bandwidth * scenario.parallel.gpus,
        cap=bandwidth * tp * scenario.parallel.pp,
        latency=latency,
        layers=sum(group.count for group in model.layers),
        per_token=tp * growing,
        bounded=tuple(bounded),
        fixed=float(tp * state_bytes_per_sequence(model, tp=tp)),
    )
