"""Parameter counts of every model against what was published and against the tensors that `transformers` creates."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from perfsim.ops.op import Op
from perfsim.ops.params import (
    active_params,
    kv_bytes_per_token,
    mtp_params,
    state_bytes_per_sequence,
    text_params,
    total_params,
    vision_params,
)
from perfsim.ops.step import StepShape, attention_spans
from perfsim.ops.transformer import lower
from perfsim.spec import catalog
from perfsim.spec.model import MixtureOfExperts, ModelArch
from perfsim.spec.yaml import load_yaml

FOLDER = Path(__file__).resolve().parents[1] / "validation" / "models"
TABLE = load_yaml(FOLDER / "published.yaml")
TOTALS = {name: row["total"] for name, row in TABLE["models"].items() if "total" in row}
ACTIVE = {name: row["active"] for name, row in TABLE["models"].items() if "active" in row}
TENSORS = {
    row["model"]: int(row["tensors"]) for row in csv.DictReader((FOLDER / "tensors.csv").read_text().splitlines())
}
TOLERANCE = {"total": 0.01, "active": 0.03}


@cache
def model(name: str) -> ModelArch:
    return catalog.model(name)


def tables(arch: ModelArch) -> int:
    return (1 if arch.tie_word_embeddings else 2) * arch.vocab_size * arch.hidden_size


def total(arch: ModelArch, counts: list[str]) -> int:
    """The sum of the terms that a published total counts; their names are explained in the table's header."""
    terms = {
        "text": text_params(arch), "vision": vision_params(arch), "mtp": mtp_params(arch),
        "mtp_tables": arch.num_nextn_predict_layers * 2 * arch.vocab_size * arch.hidden_size,
        "head_copy": arch.vocab_size * arch.hidden_size, "-tables": -tables(arch),
    }  # fmt: skip
    return sum(terms[term] for term in counts)


def active(arch: ModelArch, counts: str) -> int:
    lookup = 0 if arch.tie_word_embeddings else arch.vocab_size * arch.hidden_size
    return active_params(arch) + {"all": lookup, "computed": 0, "layers": lookup - tables(arch)}[counts]


def error(name: str, row: dict[str, Any], what: str) -> float:
    found = (total if what == "total" else active)(model(name), row["counts"])
    return found / (row["billions"] * 1e9) - 1.0


@pytest.mark.parametrize("name", TOTALS)
def test_published_totals(name: str) -> None:
    assert abs(error(name, TOTALS[name], "total")) <= TOLERANCE["total"]


@pytest.mark.parametrize("name", ACTIVE)
def test_published_active_parameters(name: str) -> None:
    assert abs(error(name, ACTIVE[name], "active")) <= TOLERANCE["active"]


@pytest.mark.parametrize("name", TABLE["misses"])
def test_listed_misses_are_missed(name: str) -> None:
    row = TABLE["misses"][name]
    assert abs(error(name, row, row["what"])) > TOLERANCE[row["what"]]
    assert row["why"]


@pytest.mark.parametrize("name", TENSORS)
def test_every_tensor_is_counted(name: str) -> None:
    """Exactly: biases, norms, sinks, decays and all."""
    assert total_params(model(name)) == TENSORS[name]


def test_every_model_is_in_the_table_or_named_as_unknown() -> None:
    known = set(TABLE["models"]) | set(TABLE["misses"])
    unknown = set(TABLE["unknown"])
    assert known | unknown == set(catalog.list_models())
    assert not known & unknown


def test_every_figure_has_its_source() -> None:
    rows = [*TOTALS.values(), *ACTIVE.values(), *TABLE["misses"].values()]
    assert all(row["source"] and isinstance(row["recalled"], bool) for row in rows)
    # What stands in a model's name or in a file at hand needs no memory; anything else has to admit it.
    assert all(row["recalled"] or "name" in row["source"] or "llm-foundry" in row["source"] for row in rows)


@pytest.mark.parametrize("name", catalog.list_models())
def test_one_token_computes_with_every_parameter_it_uses(name: str) -> None:
    """Two FLOPs per active parameter; the rest is the state, the first token's attention, norms and sampling."""
    arch = model(name)
    zeros, ones = ((value,) * len(attention_spans(arch)) for value in (0.0, 1.0))
    step = StepShape(1.0, 1.0, 1.0, ones, 0.0, zeros, zeros)
    flops = sum(op.flops * op.count for op in lower(arch, step, tp=1) if isinstance(op, Op))
    lookup = 0 if arch.tie_word_embeddings else arch.vocab_size * arch.hidden_size
    dense = all(not isinstance(group.mlp, MixtureOfExperts) for group in arch.layers)
    computed = active_params(arch) - (
        lookup if dense else 0
    )  # of a mixture the lookup is not active in the first place
    assert 2 * computed * 0.999 <= flops <= 2 * computed * 1.03


# Bytes that one more token costs, and bytes per sequence whatever its length. By hand, from the config's numbers.
CACHES = {
    "llama-4-scout-17b-16e-instruct-fp8-dynamic": (12 * 2 * 8 * 128 * 2, 0),  # 36 of 48 layers keep a chunk
    "google--gemma-4-26B-A4B": (5 * 2 * 2 * 512 * 2, 0),  # V is K's projection, yet both are cached
    "XiaomiMiMo--MiMo-V2-Flash": (9 * 4 * (192 + 128) * 2, 0),
    "deepseek-ai--DeepSeek-V3.2": (61 * ((512 + 64) * 2 + 128 + 4), 0),  # an fp8 key and its scale for the indexer
    "zai-org--GLM-5.2": (78 * (512 + 64) * 2 + 21 * 132, 0),  # 57 layers take the choice of another
    "MiniMaxAI--MiniMax-M3": (60 * 2 * 4 * 128 * 2 + 57 * 128 * 2, 0),
    "deepseek-ai--DeepSeek-V4-Flash": (
        21 * (584 + 132) / 4 + 20 * 584 / 128,  # vLLM's layout: 448 in fp8, 64 in 16 bits, 8 bytes of scales
        20 * 128 * 2 * 512 * 4 + 21 * 8 * 2 * 2 * (512 + 128) * 4,  # values and scores of unfinished spans, fp32
    ),
    "Qwen--Qwen3.5-27B": (16 * 2 * 4 * 256 * 2, 48 * (48 * 128 * 128 * 4 + (2 * 2048 + 6144) * 3 * 2)),
    "moonshotai--Kimi-K3": (24 * (512 + 64) * 2, 69 * (96 * 128 * 128 * 4 + 3 * 96 * 128 * 3 * 2)),
    "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": (
        6 * 2 * 2 * 128 * 2, 23 * (64 * 64 * 128 * 4 + (4096 + 2 * 8 * 128) * 3 * 2),
    ),
    "mistralai--Mamba-Codestral-7B-v0.1": (0, 64 * (128 * 64 * 128 * 2 + (8192 + 2 * 8 * 128) * 3 * 2)),
    "nvidia--Llama-3_3-Nemotron-Super-49B-v1": (49 * 2 * 8 * 128 * 2, 0),  # 31 of 80 layers have no attention
    "tiiuae--falcon-7b": (32 * 2 * 1 * 64 * 2, 0),
    "gpt-3-175b": (96 * 2 * 12288 * 2, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CACHES)
def test_caches_and_states(name: str) -> None:
    assert (kv_bytes_per_token(model(name)), state_bytes_per_sequence(model(name))) == CACHES[name]


# Formats of attention, other projections, experts.
FORMATS = {
    "MiniMaxAI--MiniMax-M2.5": "fp8_block fp8_block fp8_block",
    "deepseek-ai--DeepSeek-V4-Pro": "fp8_block fp8_block mxfp4",
    "sgl-project--DeepSeek-V4-Pro-FP8": "fp8_block fp8_block fp8_block",
    "zai-org--GLM-5.2-FP8": "fp8_block fp8_block fp8_block",
    "moonshotai--Kimi-K2.5": "bf16 bf16 int4_g32",
    "moonshotai--Kimi-K3": "bf16 bf16 mxfp4",
    "llama-4-scout-17b-16e-instruct-fp8-dynamic": "bf16 fp8 fp8",
    "nvidia--DeepSeek-V3.1-NVFP4": "bf16 nvfp4 nvfp4",
    "openai--gpt-oss-120b": "bf16 bf16 mxfp4",
}


@pytest.mark.parametrize("name", FORMATS)
def test_declared_formats(name: str) -> None:
    arch = model(name)
    assert f"{arch.attention_weights} {arch.linear_dtype} {arch.expert_dtype}" == FORMATS[name]
