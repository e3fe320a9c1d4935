"""One accelerator as the cost model sees it: datasheet rates with fallbacks for formats it does not have."""

from __future__ import annotations

from perfsim.errors import InfeasibleError
from perfsim.spec.hardware import Accelerator

# A format that the matrix units lack is computed in 16 bits: weight-only kernels expand 4- and 8-bit weights on the
# fly, and a GPU without bfloat16 runs the checkpoint as float16 (vLLM asks for --dtype half there), a TPU a float16 one
# as bfloat16. Some makers publish no fp32 rate; their 16-bit one is then the bound, optimistic for products and never
# what limits elementwise work.
_FALLBACK = {
    "fp4": ("bf16", "fp16"), "fp8": ("bf16", "fp16"), "int8": ("bf16", "fp16"), "bf16": ("fp16",),
    "fp16": ("bf16",), "fp32": ("bf16", "fp16"),
}  # fmt: skip


def peak_flops(accelerator: Accelerator, dtype: str) -> float:
    """Dense FLOP/s for `dtype`, or for the format it is computed in on this device.

    Raises InfeasibleError when the device has no matrix or vector unit for any of them.
    """
    for candidate in (dtype, *_FALLBACK.get(dtype, ()), "fp32"):
        for known, rate in accelerator.peak_flops.items():
            if known == candidate:
                return rate
    raise InfeasibleError(f"{accelerator.name} has no arithmetic for {dtype}", binding="dtype")
