"""How a checkpoint stores its weights: `quantization_config` of a Hugging Face config, reduced to three formats.

One is for the projections of attention (and recurrent mixers), one for dense and shared MLPs, one for the routed
experts. Embeddings, head, norms, routers and vision towers stay in the activation dtype, as every method read here
leaves them. Neglected: modules that are excluded in some layers only.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from perfsim.spec.hf_config import Config, read_config

_METHODS = {
    name: name for name in ("fp8", "fbgemm_fp8", "mxfp4", "awq", "gptq", "compressed-tensors", "modelopt")
}  # fmt: skip
_INTEGER_BITS = {4: "int4", 8: "int8"}
_MODELOPT = {"FP8": "fp8", "NVFP4": "nvfp4"}
_COMPRESSED = {("float", 8): "fp8", ("int", 8): "int8", ("int", 4): "int4", ("float", 4): "nvfp4"}
_EXCLUSION_KEYS = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")
_LAYER = re.compile(r"layers?\.(\d+)\.")
_NO_PROJECTION = re.compile("norm|bias|indexer|router|vision|lm_head|embed")
_BESIDE = "hf_quant_config"


class WeightFormats(NamedTuple):
    """Storage formats, keys of `WEIGHT_BYTES`, of attention, other projections and routed experts; are activations
    left alone?"""

    attention: str
    linear: str
    expert: str
    weight_only: bool


def declared_quantization(path: Path) -> Config | None:
    """The `quantization` of ModelOpt's `hf_quant_config.json` for the config at `path`; None without such a file.

    Looked for beside the config when that is called `config.json`, else at `hf_quant_config/` and the config's name.
    """
    file = path.with_name(f"{_BESIDE}.json") if path.name == "config.json" else path.parent / _BESIDE / path.name
    if not file.is_file():
        return None
    found = read_config(file).section("quantization")
    return None if found is None else found.with_value("quant_method", "modelopt")


def weight_formats(quantization: Config | None, *, dtype: str, layers: int) -> WeightFormats:
    """The formats of a model of `layers` layers whose activations are `dtype`, from its `quantization_config`.

    InputError for a method or width that is not supported.
    """
    if quantization is None:
        return WeightFormats(dtype, dtype, dtype, weight_only=False)
    method = quantization.choice("quant_method", _METHODS)
    quantized = _format(quantization, method)
    excluded = _excluded_everywhere(quantization, layers)
    # mxfp4 is defined for the experts alone; every other method names what it leaves out.
    parts = ("attn", "mlp", "experts")
    without = excluded | {"attn", "mlp"} if method == "mxfp4" else excluded
    attention, linear, expert = (dtype if part in without else quantized for part in parts)
    return WeightFormats(attention, linear, expert, weight_only=_weight_only(quantization, method))


def _excluded_everywhere(quantization: Config, layers: int) -> set[str]:
    """Which of attn, mlp (dense and shared) and experts are left alone in all layers, named at once or one by one."""
    names = [name for key in _EXCLUSION_KEYS for name in quantization.items(key, str)]
    found: set[str] = set()
    single: dict[str, set[int]] = {}
    for name in names:
        part = _part(name)
        layer = _LAYER.search(name)
        if part is None:
            continue
        if layer is None:
            found.add(part)
        else:
            single.setdefault(part, set()).add(int(layer.group(1)))
    return found | {part for part, where in single.items() if len(where) >= layers}


def _part(name: str) -> str | None:
    """The part of a layer whose projections an exclusion names; None when it names something else."""
    if _NO_PROJECTION.search(name):
        return None
    if "attn" in name:
        return "attn"
    if "shared" in name:
        return "mlp"
    if "experts" in name:
        return "experts"
    return "mlp" if "mlp" in name and ("_proj" in name or name.endswith("mlp")) else None


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
            formats.add(_compressed_weights(group, weights))
    if len(formats) != 1:
        raise quantization.error("config_groups", f"expected one weight format, got {sorted(formats) or 'none'}")
    return formats.pop()


def _compressed_weights(group: Config, weights: Config) -> str:
    key = (weights.text("type", default="int"), weights.integer("num_bits"))
    if key not in _COMPRESSED:
        raise weights.error("num_bits", f"unsupported {key[0]}{key[1]} weights; expected 8-bit or 4-bit ones")
    if key == ("int", 4) and weights.optional_integer("group_size") == 32:
        return "int4_g32"
    return "mxfp4" if group.text("format", default="").startswith("mxfp4") else _COMPRESSED[key]
