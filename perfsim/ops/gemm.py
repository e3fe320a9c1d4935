"""Matrix products: their FLOPs and bytes, and the arithmetic that a weight format runs in."""

from __future__ import annotations

from perfsim.ops.op import Driver, Num, Op
from perfsim.spec.model import ACTIVATION_BYTES, WEIGHT_BYTES, ModelArch


def compute_dtype(model: ModelArch, weight_dtype: str) -> str:
    """The arithmetic a weight format runs in: natively where activations are quantised too, else `model.dtype`.

    Weight-only formats are expanded on the fly. So are MXFP4 weights, whose checkpoints declare no activation format,
    and INT4 ones, for which no served format quantises activations.
    """
    if model.weight_only:
        return model.dtype
    return {"fp8": "fp8", "fp8_block": "fp8", "int8": "int8", "nvfp4": "fp4"}.get(weight_dtype, model.dtype)


def gemm(
    model: ModelArch, name: str, count: int, m: Num, n: float, k: float, *, weight_dtype: str, driver: Driver = "tokens"
) -> Op:
    """y[m, n] = x[m, k] @ W[k, n]: 2mnk FLOPs; W, x and y cross HBM once."""
    act = ACTIVATION_BYTES[model.dtype]
    weights = n * k * WEIGHT_BYTES[weight_dtype]
    dtype = compute_dtype(model, weight_dtype)
    return Op(
        "gemm", name, count, m * (2.0 * n * k), weights + m * (k * act), m * (n * act), dtype, driver, rows=m, depth=k,
        format=weight_dtype,
    )  # fmt: skip
