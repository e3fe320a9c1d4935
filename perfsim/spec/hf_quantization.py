"""How a checkpoint stores its weights: `quantization_config` of a Hugging Face config, reduced to two formats.

One format is for the projections of attention, dense and shared MLPs, one for the routed experts. Embeddings, head,
norms and routers stay in the activation dtype, as every method read here leaves them. Neglected: modules excluded in
some layers only, and attention excluded while dense or shared MLPs are not.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from perfsim.spec.hf_config import Config

_METHODS = {
    name: name for name in ("fp8", "fbgemm_fp8", "mxfp4", "awq", "gptq", "compressed-tensors", "modelopt")
}  # fmt: skip
_INTEGER_BITS = {4: "int4", 8: "int8"}
_MODELOPT = {"FP8": "fp8", "NVFP4": "nvfp4"}
_COMPRESSED = {("float", 8): "fp8", ("int", 8): "int8", ("int", 4): "int4", ("float", 4): "nvfp4"}
_EXCLUSION_KEYS = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")
_ONE_LAYER = re.compile(r"layers?\.\d+")


class WeightFormats(NamedTuple):
    """Storage formats of projections and of routed experts, keys of `WEIGHT_BYTES`; are activations left alone?"""

    linear: str
    expert: str
    weight_only: bool


def weight_formats(config: Config, *, dtype: str) -> WeightFormats:
    """The formats of a model whose activations are `dtype`; InputError for a method or width that is not supported."""
    quantization = config.section("quantization_config")
    if quantization is None:
        return WeightFormats(dtype, dtype, weight_only=False)
    method = quantization.choice("quant_method", _METHODS)
    quantized = _format(quantization, method)
    excluded = [name for key in _EXCLUSION_KEYS for name in quantization.items(key, str)]
    everywhere = [name for name in excluded if not _ONE_LAYER.search(name)]
    # mxfp4 is defined for the experts alone; every other method names what it leaves out.
    linear = dtype if method == "mxfp4" or any("attn" in name for name in everywhere) else quantized
    expert = dtype if any("experts" in name and "shared" not in name for name in everywhere) else quantized
    return WeightFormats(linear, expert, weight_only=_weight_only(quantization, method))


def _weight_only(quantization: Config, method: str) -> bool:
    """AWQ, GPTQ and MXFP4 checkpoints quantise weights alone; compressed-tensors says so per group."""
    if method != "compressed-tensors":
        return method in ("awq", "gptq", "mxfp4")
    groups = quantization.section("config_groups")
    return groups is not None and not any(group.section("input_activations") for group in groups.sections())


def _format(quantization: Config, method: str) -> str:
    if method == "fp8":
        return _fp8(quantization)
    if method in ("fbgemm_fp8", "mxfp4"):
        return method.removeprefix("fbgemm_")
    if method == "modelopt":
        return quantization.choice("quant_algo", _MODELOPT)
    if method == "compressed-tensors":
        return _compressed(quantization)
    bits = quantization.integer("bits")
    if bits not in _INTEGER_BITS:
        raise quantization.error("bits", f"unsupported {method} width {bits}; expected one of 4, 8")
    return _INTEGER_BITS[bits]


def _fp8(quantization: Config) -> str:
    block = quantization.items("weight_block_size", int)
    if not block:
        return "fp8"
    if block != [128, 128]:
        raise quantization.error("weight_block_size", f"unsupported {block}; expected [128, 128]")
    return "fp8_block"


def _compressed(quantization: Config) -> str:
    """The one weight format of all groups: `type` and `num_bits` of each must agree."""
    groups = quantization.section("config_groups")
    formats = set()
    for group in groups.sections() if groups is not None else []:
        weights = group.section("weights")
        if weights is not None:
            key = (weights.text("type", default="int"), weights.integer("num_bits"))
            if key not in _COMPRESSED:
                raise weights.error("num_bits", f"unsupported {key[0]}{key[1]} weights; expected 8-bit or 4-bit ones")
            formats.add(_COMPRESSED[key])
    if len(formats) != 1:
        raise quantization.error("config_groups", f"expected one weight format, got {sorted(formats) or 'none'}")
    return formats.pop()
