"""From a Hugging Face `config.json` to a ModelArch; what each architecture means is in `hf_families.py`.

Multi-modal configs keep the language model under `text_config`: its keys are read there, and the vision tower is
counted when `vision_config` describes one. Sound encoders and image generation are not read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from perfsim.errors import InputError, nearest
from perfsim.spec.hf_config import Config, read_config
from perfsim.spec.hf_families import FAMILIES, Family
from perfsim.spec.hf_hybrid import nemotron_kinds
from perfsim.spec.hf_quantization import declared_quantization, weight_formats
from perfsim.spec.model import LayerGroup, ModelArch
from perfsim.spec.problems import shorten, validated

MAX_LAYERS = 4096
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def load_model(path: str | Path, *, name: str | None = None, hf_id: str | None = None) -> ModelArch:
    """The model that a `config.json` describes; `name` defaults to the file's stem.

    A quantisation that the config does not declare is read from ModelOpt's file beside it: `hf_quant_config.json`, or
    `hf_quant_config/NAME.json` for NAME.json. Raises InputError of one line, naming file and key, for a broken file, a
    missing key, a value of the wrong type or out of range, sizes that contradict each other, and an architecture or
    quantisation that is not supported.
    """
    beside = declared_quantization(Path(path))
    return model_from_config(read_config(path), name=name or Path(path).stem, hf_id=hf_id, quantization=beside)


def model_from_config(
    config: Config, *, name: str, hf_id: str | None = None, quantization: Config | None = None
) -> ModelArch:
    """The ModelArch of a parsed config; `quantization` counts when the config has none. Errors as for `load_model`."""
    architecture = _architecture(config)
    family = FAMILIES[architecture]
    text = (config.section("text_config") or config).renamed(family.names)
    dtype = _dtype(text if _dtype_key(text) else config)
    declared = config.section("quantization_config") or text.section("quantization_config") or quantization
    count = _layer_count(text)
    formats = weight_formats(declared, dtype=dtype, layers=count)
    tied = config if "tie_word_embeddings" in config else text
    content = {
        "name": name,
        "hf_id": hf_id,
        "architecture": architecture,
        "hidden_size": text.integer("hidden_size"),
        "vocab_size": text.integer("vocab_size"),
        "layers": _layer_groups(text, family, count),
        "tie_word_embeddings": tied.flag("tie_word_embeddings", default=False),
        "dtype": dtype,
        "linear_dtype": formats.linear,
        "attention_dtype": None if formats.attention == formats.linear else formats.attention,
        # DeepSeek-V4 names the format of its experts apart from that of the rest, whose method is fp8.
        "expert_dtype": text.choice("expert_dtype", {"fp4": "mxfp4"}) if "expert_dtype" in text else formats.expert,
        "weight_only": formats.weight_only,
        "lm_head_bias": text.flag("lm_head_bias", default=False),
        "num_nextn_predict_layers": text.integer("num_nextn_predict_layers", default=0, minimum=0, maximum=64),
        **family.options(text),
    }
    content.setdefault("max_position_embeddings", None)
    if content["max_position_embeddings"] is None:
        content["max_position_embeddings"] = text.integer("max_position_embeddings")
    vision = config.section("vision_config")
    if vision is not None and family.vision is not None:
        content["vision"] = family.vision(vision, content["hidden_size"])
    return validated(ModelArch, content, where=config.where)


def _architecture(config: Config) -> str:
    names = config.items("architectures", str)
    some = f"{', '.join(list(FAMILIES)[:6])}, ... ({len(FAMILIES)} in all)"
    if not names:
        raise InputError(f"{config.where}: missing key 'architectures'; expected one of {some}")
    if names[0] not in FAMILIES:
        hint = nearest(names[0][:100], FAMILIES) or f"; supported: {some}"
        raise config.error("architectures", f"unsupported '{shorten(names[0])}'{hint}")
    return names[0]


def _dtype_key(config: Config) -> str | None:
    return next((key for key in ("torch_dtype", "dtype") if key in config), None)


def _dtype(config: Config) -> str:
    """The activation dtype: `torch_dtype`, `dtype` in newer configs, bf16 in those without (gpt-oss ships so)."""
    return config.choice(_dtype_key(config) or "dtype", _DTYPES, default="bfloat16")


def _layer_count(config: Config) -> int:
    """`num_hidden_layers`; hybrid stacks may leave it to the list of their blocks, which it must not contradict."""
    listed = "hybrid_override_pattern" in config or "layers_block_type" in config
    blocks = len(nemotron_kinds(config)) if listed else None
    count = config.integer("num_hidden_layers", default=blocks, maximum=MAX_LAYERS)
    if blocks is not None and blocks != count:
        raise config.error("num_hidden_layers", f"expected {blocks}, the number of blocks in the pattern, got {count}")
    return count


def _layer_groups(config: Config, family: Family, count: int) -> list[LayerGroup]:
    """Equal layers counted together, in the order of their first appearance."""
    reach = config.integer("max_position_embeddings", default=2**31 - 1)
    shapes: dict[LayerGroup, int] = {}
    for layer in family.layers(config, count):
        shape = _unlimited(layer, reach)
        shapes[shape] = shapes.get(shape, 0) + 1
    return [layer.model_copy(update={"count": number}) for layer, number in shapes.items()]


def _unlimited(layer: LayerGroup, reach: int) -> LayerGroup:
    """A window or chunk as long as the longest sequence never cuts anything off."""
    attention: Any = layer.attention
    if attention is None or attention.kind != "gqa":
        return layer
    idle = {key: None for key in ("window", "chunk") if (getattr(attention, key) or 0) >= reach}
    return layer.model_copy(update={"attention": attention.model_copy(update=idle)}) if idle else layer
