"""Number formats of checkpoints as tables state them, in a column or in a checkpoint's name."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from validation.compare import facts
from validation.compare.facts import InexpressibleError

if TYPE_CHECKING:
    from perfsim.spec.model import ModelArch

# What a label says of weights: (format, whether activations keep 16 bits); None: not quantised. `sq` is SmoothQuant,
# of `w4a8_mxfp4_mxfp8` perfsim has the bytes, and multiplies in 16 bits.
LABELS: dict[str, tuple[str | None, bool]] = {
    "bfloat16": (None, False), "float16": (None, False), "bf16": (None, False), "fp16": (None, False),
    "fp8": ("fp8", False), "fp8_static": ("fp8", False), "fp8_ootb": ("fp8", False),
    "fp8_block": ("fp8_block", False), "nvfp4": ("nvfp4", False), "fp4": ("nvfp4", False),
    "mxfp4": ("mxfp4", True), "w4a16_mxfp4": ("mxfp4", True), "w4a8_mxfp4_mxfp8": ("mxfp4", True),
    "int8": ("int8", False), "sq": ("int8", False),
    "w8a8": ("int8", False), "int8_wo": ("int8", True), "w8a16": ("int8", True), "int4": ("int4", True),
    "int4_wo": ("int4", True), "w4a16": ("int4", True), "awq": ("int4", True), "gptq": ("int4", True),
}  # fmt: skip
# How names of quantised checkpoints end: `-FP8`, `-FP8-dynamic`, `-NVFP4-v2`, `-AWQ`, `-GPTQ-Int4`, `-quantized.w4a16`.
_ENDINGS = (
    (re.compile(r"[-_.](?:nvfp4|fp4)(?:[-_]v\d+)?$", re.I), "nvfp4"),
    (re.compile(r"[-_.]fp8(?:[-_](?:dynamic|static|kv|v\d+))*$", re.I), "fp8"),
    (re.compile(r"[-_.](?:gptq|awq)[-_](?:int)?8(?:bit)?$|[-_.](?:quantized\.)?w8a16$", re.I), "int8_wo"),
    (re.compile(r"[-_.](?:awq|gptq)(?:[-_](?:int)?4(?:bit)?)?$|[-_.](?:quantized\.)?w4a16$", re.I), "int4_wo"),
    (re.compile(r"[-_.]int4$", re.I), "int4_wo"),
    (re.compile(r"[-_.](?:quantized\.)?w8a8$|[-_.]int8$", re.I), "int8"),
)  # fmt: skip
EIGHT_BITS = ("fp8", "fp8_block")


def ending(name: str) -> tuple[str, str | None]:
    """(the name without what it says about its weights, that label); (the whole name, None) where it says nothing.

    >>> ending("nvidia/DeepSeek-R1-0528-NVFP4-v2"), ending("Qwen/Qwen3-32B")
    (('nvidia/DeepSeek-R1-0528', 'nvfp4'), ('Qwen/Qwen3-32B', None))
    """
    for pattern, label in _ENDINGS:
        found = pattern.search(name)
        if found and found.start():
            return name[: found.start()], label
    return name, None


def format_of(name: str | None) -> str | None:
    """The label that the name of a quantised checkpoint ends in; None where it has none."""
    return ending(name or "")[1]


def named_formats(name: str | None) -> dict[str, str | bool]:
    """What replaces the formats of the descriptor of a checkpoint of this name, where the name says other ones."""
    return weight_formats(facts.model(name), gemm=format_of(name), moe=None)


def named_arch(name: str | None) -> ModelArch:
    """The descriptor of a checkpoint of this name, in the formats that the name says."""
    return facts.arch(facts.model(name)).model_copy(update=named_formats(name))


def only_format(name: str, precision: str) -> str | None:
    """The label of all weights of a checkpoint that ran in a precision; None where more than one fits.

    Eight bits of a checkpoint that has none itself may be scaled per tensor or in blocks.
    """
    own = format_of(name)
    wanted = LABELS[precision.lower()][0]
    if wanted not in EIGHT_BITS:
        return precision
    if own is not None and LABELS[own][0] in EIGHT_BITS:
        return own
    return precision if facts.arch(facts.model(name)).linear_dtype in EIGHT_BITS else None


def check_precision(precision: str | None, gemm: str) -> None:
    """InexpressibleError where a row states 16-bit weights and others, or 4-bit and 8-bit floats, at once."""
    if precision is None:
        return
    stated, weights = LABELS[precision.lower()][0], LABELS[gemm.lower()][0]
    floats = {"fp8": 8, "fp8_block": 8, "nvfp4": 4, "mxfp4": 4, None: 16}
    if stated in floats and weights in floats and floats[stated] != floats[weights]:
        raise InexpressibleError(f"precision '{precision}' and weights in {gemm} do not go together")


def weight_formats(model: str, *, gemm: str | None, moe: str | None) -> dict[str, str | bool]:
    """What replaces the checkpoint's formats; {} where the named checkpoint has the stated ones already.

    `gemm` is of all projections, `moe` of the routed experts; one that is not stated is as the other. Labels say fp8
    for every 8-bit float. NVFP4 checkpoints of a model whose own is FP8 or INT4 quantise the projections outside
    attention and the experts, which stays in bf16 (NVIDIA's DeepSeek-V3.1-NVFP4, hf_quant_config.json).
    """
    found = facts.arch(model)
    for label in (gemm, moe):
        if label is not None and label.lower() not in LABELS:
            raise InexpressibleError(f"weight format '{label}' not known")
    first, second = gemm or moe, moe or gemm
    if first is None or second is None or found.expert_dtype == "mxfp4":
        return {}  # nothing stated, or a checkpoint that exists in one format only
    linear, linear_only = LABELS[first.lower()]
    expert, expert_only = LABELS[second.lower()]
    if linear == "nvfp4" and found.linear_dtype != "nvfp4" and (found.linear_dtype in EIGHT_BITS or _int4(model)):
        named = {"linear_dtype": "nvfp4", "expert_dtype": "nvfp4", "attention_dtype": found.dtype}
        return {**named, "weight_only": False} if found.weight_only else {**named}
    if _int4(model) and expert is not None:
        return {}  # experts of 4-bit integers, as published
    if not facts.has_experts(model):
        expert, expert_only = linear, linear_only
    if linear and expert and linear_only != expert_only:
        raise InexpressibleError(f"weights in {first} beside experts in {second} are not modelled")
    own, wanted = (found.linear_dtype, found.expert_dtype), (linear or found.dtype, expert or found.dtype)
    chosen = tuple(_same(mine, other) for mine, other in zip(own, wanted, strict=True))
    only = linear_only or expert_only
    if chosen == own and only == found.weight_only:
        return {}
    changed: dict[str, str | bool] = {"linear_dtype": chosen[0], "expert_dtype": chosen[1]}
    if only != found.weight_only:
        changed["weight_only"] = only
    return changed


def _same(own: str, stated: str) -> str:
    """A checkpoint's own format where the label is another word for it."""
    alike = own in EIGHT_BITS and stated in EIGHT_BITS
    return own if alike else stated


def _int4(model: str) -> bool:
    return facts.arch(model).expert_dtype == "int4_g32"
