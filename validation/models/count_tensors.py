"""Counts the tensors that `transformers` itself would create for each model config: an oracle for `perfsim.ops.params`.

`python -m validation.models.count_tensors` needs `transformers` (5.24.0 was used) and torch, builds every model on the
meta device (no memory, no download) and rewrites `tensors.csv` beside this file. Counted are parameters, tied ones
once, and the routers' score-correction biases, which some classes keep as buffers though checkpoints hold them. A
tower that a config does not describe is not counted. Models whose code is not in `transformers` have no row.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parents[1] / "workloads" / "models"
TABLE = HERE / "tensors.csv"
# What these configs call themselves is not what `transformers` calls it.
MODEL_TYPES = {"deepseek_ref": "deepseek_v4", "minimax_m3": "minimax_m3_vl_text", "kimi_k2": "deepseek_v3"}
# Step 3.7's language model has no class with a head of its own; its head is as large as its embedding.
HEADLESS = {"step3p7": "step3p5"}
OTHER_NAMES = {"step3p7": {"num_experts": "n_routed_experts"}}
TOWERS = ("vision", "visual", "multi_modal", "mm_projector")


def count(path: Path) -> dict[str, Any]:
    """The row of one config. Raises LookupError when `transformers` has no code for it."""
    import torch
    import transformers

    raw = json.loads(path.read_text())
    towers = "vision_config" in raw
    for content in (raw, raw.get("text_config", {})):
        content.pop("quantization_config", None)
        content.pop("auto_map", None)
    kind = raw["model_type"]
    for name, other in OTHER_NAMES.get(kind, {}).items():
        raw[other] = raw.pop(name)
    raw["model_type"] = HEADLESS.get(kind, MODEL_TYPES.get(kind, kind))
    if kind in MODEL_TYPES or kind in HEADLESS:
        raw.pop("architectures")
    model_class, config = _class_and_config(transformers, raw)
    with torch.device("meta"):
        model = model_class(config)
    parameters = sum(p.numel() for name, p in model.named_parameters() if towers or not _tower(name))
    if kind in HEADLESS:
        parameters += model.get_input_embeddings().weight.numel()
    biases = sum(
        b.numel() for name, b in model.named_buffers() if "e_score_correction_bias" in name or "router_bias" in name
    )
    return {"model": path.stem, "tensors": parameters + biases, "class": model_class.__name__,
            "transformers": transformers.__version__}  # fmt: skip


def _tower(name: str) -> bool:
    return any(word in name for word in TOWERS)


def _class_and_config(transformers: Any, raw: dict[str, Any]) -> tuple[Any, Any]:
    from transformers.models.auto import configuration_auto, modeling_auto

    if raw["model_type"] in ("minimax_m3_vl_text", "step3p5"):
        return _by_hand(raw)
    if raw["model_type"] not in configuration_auto.CONFIG_MAPPING:
        raise LookupError(raw["model_type"])
    config = configuration_auto.CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    named = getattr(transformers, (raw.get("architectures") or [""])[0], None)
    if named is not None:
        return named, config
    for mapping in (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)], config
    raise LookupError(raw["model_type"])


def _by_hand(raw: dict[str, Any]) -> tuple[Any, Any]:
    """Text models that `transformers` reaches only through their multi-modal wrapper."""
    if raw["model_type"] == "step3p5":
        from transformers.models.step3p7 import configuration_step3p7, modeling_step3p7

        return modeling_step3p7.Step3p7TextModel, configuration_step3p7.Step3p7TextConfig.from_dict(raw)
    from transformers.models.minimax_m3_vl import configuration_minimax_m3_vl, modeling_minimax_m3_vl

    config = configuration_minimax_m3_vl.MiniMaxM3VLTextConfig.from_dict(raw)
    return modeling_minimax_m3_vl.MiniMaxM3VLForCausalLM, config


def main() -> None:
    rows = []
    for path in sorted(CONFIGS.glob("*.json")):
        try:
            rows.append(count(path))
        except LookupError as missing:
            print(f"{path.stem}: not in transformers: {missing}", file=sys.stderr)
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["model", "tensors", "class", "transformers"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
