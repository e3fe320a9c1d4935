"""Time to bring a LoRA adapter from host memory to the GPU."""

from __future__ import annotations

from perfsim.ops.lora import adapter_bytes, adapter_tensors
from perfsim.spec.hardware import Node
from perfsim.spec.model import ModelArch
from perfsim.spec.policy import LoraServing


def adapter_load_seconds(model: ModelArch, lora: LoraServing | None, node: Node, *, tp: int) -> float:
    """Tensors x latency + bytes / bandwidth of the host link; all `tp` GPUs copy their parts at the same time.
    Zero without adapters.

    Neglected: other traffic on the link.
    """
    if lora is None:
        return 0.0
    link = node.host_link
    return adapter_tensors(model) * link.latency + adapter_bytes(model, lora, tp=tp) / link.bandwidth
