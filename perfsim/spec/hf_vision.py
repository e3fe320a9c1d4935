"""Vision towers with their projectors, read from the `vision_config` of a Hugging Face config: how many weights.

Each sum follows the tensors of the model's own code (`transformers` 5.24; Kimi K3: vLLM 0.32). Only weights are
counted; what it costs to encode an image is not modelled.
"""

from __future__ import annotations

from perfsim.spec.hf_config import Config
from perfsim.spec.model import VisionTower

MAX_SIDE = 2**14  # image sides and table lengths: far beyond any real one, and products stay exact


def qwen(vision: Config, text_hidden: int) -> VisionTower:
    """Qwen3-VL and Qwen3.5: a 3D patch embedding, learned positions, and a merger per tapped layer and at the end."""
    hidden, depth, width = (vision.integer(key) for key in ("hidden_size", "depth", "intermediate_size"))
    patch, merge = vision.integer("patch_size", maximum=MAX_SIDE), vision.integer("spatial_merge_size", maximum=64)
    pixels = vision.integer("in_channels") * vision.integer("temporal_patch_size", maximum=64) * patch * patch
    out, merged = vision.integer("out_hidden_size"), hidden * merge * merge
    merger = _linear(merged, merged) + _linear(merged, out)
    taps = len(vision.items("deepstack_visual_indexes", int))
    params = _linear(pixels, hidden) + vision.integer("num_position_embeddings") * hidden
    params += depth * _block(hidden, hidden, width) + merger + 2 * hidden + taps * (merger + 2 * merged)
    heads = vision.integer("num_heads")
    return _tower(params, layers=depth, hidden=hidden, width=width, heads=heads, patch=patch)


def llama4(vision: Config, text_hidden: int) -> VisionTower:
    """Llama 4: a ViT with a class token, an adapter after the pixel shuffle and one projection to the text model."""
    hidden, depth = vision.integer("hidden_size"), vision.integer("num_hidden_layers")
    width, out = vision.integer("intermediate_size"), vision.integer("projector_output_dim")
    patch, image = vision.integer("patch_size", maximum=MAX_SIDE), vision.integer("image_size", maximum=MAX_SIDE)
    into = vision.integer("projector_input_dim")
    positions = (image // patch) ** 2 + 1
    params = 3 * patch * patch * hidden + (positions + 1) * hidden + 2 * 2 * hidden
    params += depth * _block(hidden, hidden, width)
    params += width * into + out * out + vision.integer("vision_output_dim") * text_hidden
    heads = vision.integer("num_attention_heads")
    return _tower(params, layers=depth, hidden=hidden, width=width, heads=heads, patch=patch)


def gemma4(vision: Config, text_hidden: int) -> VisionTower:
    """Gemma 4: gated MLPs, four norms per layer, normalised Q and K, a position table per axis; no biases."""
    hidden, depth = vision.integer("hidden_size"), vision.integer("num_hidden_layers")
    width, heads = vision.integer("intermediate_size"), vision.integer("num_attention_heads")
    kv_heads, size = vision.integer("num_key_value_heads"), vision.integer("head_dim")
    patch = vision.integer("patch_size", maximum=MAX_SIDE)
    attention = hidden * size * (2 * heads + 2 * kv_heads) + 2 * size
    layer = attention + 3 * hidden * width + 4 * hidden
    params = 3 * patch * patch * hidden + 2 * vision.integer("position_embedding_size") * hidden
    params += depth * layer + hidden * text_hidden
    return _tower(params, layers=depth, hidden=hidden, width=width, heads=heads, patch=patch)


def moonvit(vision: Config, text_hidden: int) -> VisionTower:
    """Kimi: MoonViT; K3's has attention wider than the hidden size, RMS norms and no biases."""
    hidden, depth = vision.integer("vt_hidden_size"), vision.integer("vt_num_hidden_layers")
    width, heads = vision.integer("vt_intermediate_size"), vision.integer("vt_num_attention_heads")
    patch, inner = vision.integer("patch_size", maximum=MAX_SIDE), vision.integer("qkv_hidden_size", default=hidden)
    merged = hidden
    for factor in vision.items("merge_kernel_size", int):
        merged *= factor
    grid = vision.integer("init_pos_emb_height", maximum=MAX_SIDE) * vision.integer(
        "init_pos_emb_width", maximum=MAX_SIDE
    )
    norm = hidden if vision.text("norm_type", default="layernorm") == "rmsnorm" else 2 * hidden
    attn_bias, bias = vision.flag("attn_bias", default=True), vision.flag("linear_bias", default=True)
    layer = _linear(hidden, 3 * inner, bias=attn_bias) + _linear(inner, hidden, bias=attn_bias)
    layer += _linear(hidden, width, bias=bias) + _linear(width, hidden, bias=bias) + 2 * norm
    second = vision.text("mm_projector_type", default="patchmerger") == "patchmergerv2"
    projector = _linear(merged, merged, bias=not second) + _linear(merged, text_hidden, bias=not second)
    projector += text_hidden if second else 2 * hidden
    stem = _linear(3 * patch * patch, hidden, bias=vision.flag("patch_embed_proj_bias", default=True))
    params = stem + grid * hidden + depth * layer + norm + projector
    return _tower(params, layers=depth, hidden=hidden, width=width, heads=heads, patch=patch)


def _linear(columns: int, rows: int, *, bias: bool = True) -> int:
    return columns * rows + (rows if bias else 0)


def _block(hidden: int, inner: int, width: int) -> int:
    """A ViT layer: four projections and a plain MLP, all with biases, and two LayerNorms."""
    attention = 3 * _linear(hidden, inner) + _linear(inner, hidden)
    return attention + _linear(hidden, width) + _linear(width, hidden) + 4 * hidden


def _tower(params: int, *, layers: int, hidden: int, width: int, heads: int, patch: int) -> VisionTower:
    return VisionTower(
        params=params, num_hidden_layers=layers, hidden_size=hidden, intermediate_size=width,
        num_attention_heads=heads, patch_size=patch,
    )  # fmt: skip
