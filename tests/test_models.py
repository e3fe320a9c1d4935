"""Model descriptors and their closed-form counts against published numbers, and what a broken config is told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfsim.errors import InfeasibleError, InputError
from perfsim.ops.params import (
    active_params,
    check_tensor_parallel,
    kv_bytes_per_token,
    kv_bytes_per_token_per_gpu,
    mtp_params,
    state_bytes_per_sequence,
    total_params,
    weight_bytes,
    weight_bytes_per_gpu,
)
from perfsim.spec import catalog
from perfsim.spec.hf_config import Config
from perfsim.spec.huggingface import FAMILIES, load_model, model_from_config
from perfsim.spec.model import GroupedQueryAttention, ModelArch

MODELS = catalog.list_models()
FOLDER = Path(__file__).resolve().parents[1] / "workloads" / "models"

KV_BYTES = {
    "llama-2-7b-hf": 2 * 32 * 32 * 128 * 2,
    "llama-3.1-8b-instruct": 131072,
    "llama-3.1-70b-instruct": 2 * 80 * 8 * 128 * 2,
    "qwen2.5-7b-instruct": 2 * 28 * 4 * 128 * 2,
    "deepseek-ai--DeepSeek-V3": 70272,
    "deepseek-v2-lite": (512 + 64) * 2 * 27,
    "openai--gpt-oss-20b": 2 * 12 * 8 * 64 * 2,
    "openai--gpt-oss-120b": 2 * 18 * 8 * 64 * 2,
    "microsoft--Phi-mini-MoE-instruct": 0,
}


def _raw(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return content


def _model(content: dict[str, Any]) -> ModelArch:
    return model_from_config(Config(content, where="config.json"), name="changed")


@pytest.mark.parametrize("name", MODELS)
def test_every_config_loads(name: str) -> None:
    model, raw = catalog.model(name), _raw(name)
    text = raw.get("text_config", raw)
    blocks = text.get("layers_block_type", [])
    assert model.num_hidden_layers == next(
        (text[key] for key in ("num_hidden_layers", "n_layer", "n_layers") if key in text), len(blocks)
    )
    assert model.hf_id is not None or name == "gpt-3-175b"
    assert 0 < active_params(model) <= total_params(model)


def test_dense_models_use_all_parameters() -> None:
    for name in ("llama-2-7b-hf", "Qwen--Qwen3-0.6B", "XiaomiMiMo--MiMo-7B-Base"):
        assert active_params(catalog.model(name)) == total_params(catalog.model(name))


def test_prediction_layers_are_counted_apart() -> None:
    # DeepSeek-V3's README_WEIGHTS: 11.5B unique parameters in the prediction module, recalled.
    assert mtp_params(catalog.model("deepseek-ai--DeepSeek-V3")) == pytest.approx(11.5e9, rel=0.02)
    # The MiMo-7B checkpoint holds 7.83B parameters (model page, recalled).
    mimo = catalog.model("XiaomiMiMo--MiMo-7B-Base")
    assert total_params(mimo) + mtp_params(mimo) == pytest.approx(7.83e9, rel=0.002)
    assert mtp_params(catalog.model("llama-2-7b-hf")) == 0


@pytest.mark.parametrize(("name", "expected"), KV_BYTES.items())
def test_kv_bytes_per_token(name: str, expected: int) -> None:
    assert kv_bytes_per_token(catalog.model(name)) == expected


def test_weight_bytes_follow_the_storage_format() -> None:
    assert weight_bytes(catalog.model("llama-2-7b-hf")) == 2 * 6_738_415_616
    # gpt-oss checkpoint sizes: 12.8 GiB and 60.8 GiB, model card, arXiv:2508.10925, table 1, recalled.
    assert weight_bytes(catalog.model("openai--gpt-oss-20b")) == pytest.approx(12.8 * 2**30, rel=0.01)
    assert weight_bytes(catalog.model("openai--gpt-oss-120b")) == pytest.approx(60.8 * 2**30, rel=0.01)
    full, fp8 = (weight_bytes(catalog.model(f"Qwen--Qwen3-32B{suffix}")) for suffix in ("", "-FP8"))
    assert 0.5 < fp8 / full < 0.55


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_shards_cover_the_model(name: str, tp: int) -> None:
    model = catalog.model(name)
    try:
        check_tensor_parallel(model, tp=tp)
    except InfeasibleError:
        with pytest.raises(InfeasibleError, match="not divisible"):
            weight_bytes_per_gpu(model, tp=tp)
        return
    whole, shard = weight_bytes(model), weight_bytes_per_gpu(model, tp=tp)
    assert whole <= tp * shard * (1 + 1e-12)
    assert shard <= whole
    assert kv_bytes_per_token(model) <= tp * kv_bytes_per_token_per_gpu(model, tp=tp)


def test_a_divisible_dense_model_copies_only_its_norms() -> None:
    model = catalog.model("llama-3.1-8b-instruct")
    for tp in (2, 4, 8):
        norms = (2 * 32 + 1) * 4096 * 2
        assert tp * weight_bytes_per_gpu(model, tp=tp) == weight_bytes(model) + (tp - 1) * norms
        assert kv_bytes_per_token_per_gpu(model, tp=tp) == kv_bytes_per_token(model) // tp


def test_fewer_kv_heads_than_gpus_are_copied() -> None:
    model = catalog.model("qwen2.5-7b-instruct")  # 4 K/V heads, 28 heads
    head = 2 * 28 * 128 * 2
    assert [kv_bytes_per_token_per_gpu(model, tp=tp) for tp in (1, 2, 4)] == [4 * head, 2 * head, head]
    wide = catalog.model("Qwen--Qwen3-30B-A3B")  # 4 K/V heads, 32 heads
    assert kv_bytes_per_token_per_gpu(wide, tp=8) == kv_bytes_per_token_per_gpu(wide, tp=4)
    latent = catalog.model("deepseek-ai--DeepSeek-V3")
    assert kv_bytes_per_token_per_gpu(latent, tp=8) == kv_bytes_per_token(latent)


def test_indivisible_heads_are_infeasible() -> None:
    with pytest.raises(InfeasibleError, match=r"num_attention_heads \(28\)") as caught:
        weight_bytes_per_gpu(catalog.model("qwen2.5-7b-instruct"), tp=8)
    assert caught.value.binding == "tensor_parallel_size"


def test_defaults_of_missing_keys() -> None:
    raw = _raw("llama-2-7b-hf")
    for key in ("num_key_value_heads", "torch_dtype", "tie_word_embeddings", "rope_scaling"):
        raw.pop(key)
    model = _model(raw)
    attention = model.layers[0].attention
    assert attention.kind == "gqa"
    assert (attention.num_key_value_heads, attention.head_dim, model.dtype) == (32, 128, "bf16")
    assert _model({**raw, "dtype": "float16"}).dtype == "fp16"
    assert _model({**raw, "num_key_value_heads": None, "head_dim": None}).layers == model.layers


def test_windows() -> None:
    qwen = _raw("qwen2.5-7b-instruct") | {"sliding_window": 4096}
    assert [group.attention.window for group in _model(qwen).layers] == [None]
    sliding = _model(qwen | {"use_sliding_window": True, "max_window_layers": 21})
    assert [(group.count, group.attention.window) for group in sliding.layers] == [(21, None), (7, 4096)]
    mistral = _raw("mistral-nemo-instruct-2407")
    assert _model(mistral | {"sliding_window": 4096}).layers[0].attention.window == 4096
    assert _model(mistral | {"sliding_window": mistral["max_position_embeddings"]}).layers[0].attention.window is None
    oss = catalog.model("openai--gpt-oss-20b")
    assert sorted((group.attention.window or 0, group.count) for group in oss.layers) == [(0, 12), (128, 12)]


def test_chunks() -> None:
    """Three of four layers of Llama 4 attend their own chunk; one as long as the longest sequence cuts nothing off."""
    scout = _raw("meta-llama--Llama-4-Scout-17B-16E-Instruct")
    chunks = {group.attention.chunk: group.count for group in _model(scout).layers}
    assert chunks == {8192: 36, None: 12}
    text = scout["text_config"] | {"max_position_embeddings": 8192}
    assert [group.attention.chunk for group in _model(scout | {"text_config": text}).layers] == [None]
    attention = _model(scout).layers[0].attention
    assert (attention.reach.chunk, attention.reach.window, attention.reach.grows) == (8192, None, False)
    with pytest.raises(ValueError, match="at most one of window, chunk and indexer"):
        GroupedQueryAttention.model_validate(attention.model_dump() | {"window": 8})


def test_layers_that_share_an_indexer() -> None:
    """The list of GLM-5.2 is what vLLM's rule gives from the period and the offset."""
    raw = _raw("zai-org--GLM-5.2")
    assert _model(raw | {"indexer_types": None}).layers == _model(raw).layers
    shared = sum(group.count for group in _model(raw).layers if group.attention.indexer.shared)
    assert shared == 57


def test_hybrid_stacks() -> None:
    nano = catalog.model("nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16")
    kinds = {(g.attention and g.attention.kind, g.mlp and g.mlp.kind): (g.count, g.norm_count) for g in nano.layers}
    assert kinds == {("mamba2", None): (23, 1), (None, "moe"): (23, 1), ("gqa", None): (6, 1)}
    falcon = catalog.model("tiiuae--falcon-7b").layers[0]
    assert (falcon.parallel, falcon.norm_count, falcon.blocks) == (True, 1, 2)
    kimi = catalog.model("moonshotai--Kimi-K3")
    recurrent = sum(group.count for group in kimi.layers if group.reach is None and group.state is not None)
    assert (recurrent, kimi.num_hidden_layers) == (69, 93)


@pytest.mark.parametrize("name", MODELS)
def test_states_are_shared_out_among_gpus(name: str) -> None:
    model = catalog.model(name)
    whole = state_bytes_per_sequence(model)
    for tp in (2, 8, 16):
        share = state_bytes_per_sequence(model, tp=tp)
        assert share <= whole <= share * tp


def test_modelopt_declares_beside_the_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_raw("deepseek-v2-lite")))
    assert load_model(tmp_path / "config.json").linear_dtype == "bf16"
    beside = tmp_path / "hf_quant_config.json"
    beside.write_text(json.dumps({"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}))
    model = load_model(tmp_path / "config.json")
    assert (model.attention_weights, model.linear_dtype, model.expert_dtype) == ("fp8", "fp8", "fp8")
    beside.write_text(json.dumps({"quantization": {"quant_algo": "W4A8"}}))
    with pytest.raises(InputError, match=r"hf_quant_config\.json: quantization: quant_algo: unsupported 'W4A8'"):
        load_model(tmp_path / "config.json")


def test_open_ends_in_lists_are_read(tmp_path: Path) -> None:
    """Mamba's limit of time steps is `[0.0, Infinity]`; it is not used, and not a reason to refuse."""
    path = tmp_path / "mamba.json"
    path.write_text(json.dumps(_raw("mistralai--Mamba-Codestral-7B-v0.1") | {"time_step_limit": [0.0, math.inf]}))
    assert load_model(path).layers[0].attention.kind == "mamba2"


def test_which_layers_are_dense() -> None:
    deepseek = _raw("deepseek-ai--DeepSeek-V3")
    kinds = [(group.count, group.mlp.kind) for group in _model(deepseek).layers]
    assert kinds == [(3, "dense"), (58, "moe")]
    every_other = [(group.count, group.mlp.kind) for group in _model(deepseek | {"moe_layer_freq": 2}).layers]
    assert every_other == [(32, "dense"), (29, "moe")]
    qwen = _raw("Qwen--Qwen3-30B-A3B")
    mixed = _model(qwen | {"decoder_sparse_step": 2, "mlp_only_layers": [1]})
    assert [(group.count, group.mlp.kind) for group in mixed.layers] == [(25, "dense"), (23, "moe")]


@pytest.mark.parametrize(
    ("quantization", "formats"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8_block fp8_block fp8_block"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "fp8 fp8 fp8"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "int4 int4 int4"),
        ({"quant_method": "gptq", "bits": 8}, "int8 int8 int8"),
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}, "bf16 bf16 mxfp4"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["*self_attn*"]}, "bf16 nvfp4 nvfp4"),
        ({"quant_method": "fp8", "modules_to_not_convert": ["model.layers.0.self_attn"]}, "fp8 fp8 fp8"),
        ({"quant_method": "fp8", "ignore": [f"model.layers.{i}.self_attn.q_proj" for i in range(32)]}, "bf16 fp8 fp8"),
        ({"quant_method": "fp8", "ignore": [f"model.layers.{i}.self_attn.q_norm" for i in range(32)]}, "fp8 fp8 fp8"),
        ({"quant_method": "fp8", "ignore": ["re:.*mlp.(gate|up|down)_proj.*", "shared_experts"]}, "fp8 bf16 fp8"),
        ({"quant_method": "fp8", "ignore": ["model.layers.*.mlp.experts"]}, "fp8 fp8 bf16"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}},
                "ignore": ["lm_head"],
            },
            "fp8 fp8 fp8",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 32}}},
            },
            "int4_g32 int4_g32 int4_g32",
        ),
    ],
)
def test_quantization(quantization: dict[str, Any], formats: str) -> None:
    """Of attention, other projections and experts."""
    model = _model(_raw("mixtral-8x7b-v0.1") | {"quantization_config": quantization})
    assert f"{model.attention_weights} {model.linear_dtype} {model.expert_dtype}" == formats
    assert model.dtype == "bf16"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama-2-7b-hf", {"hidden_size": None}, "missing key 'hidden_size'"),
        ("llama-2-7b-hf", {"hidden_size": -1}, "hidden_size: expected a whole number from 1 to 2147483647, got -1"),
        ("llama-2-7b-hf", {"hidden_size": "4096"}, "hidden_size: expected a whole number, got '4096'"),
        ("llama-2-7b-hf", {"hidden_size": True}, "hidden_size: expected a whole number, got True"),
        ("llama-2-7b-hf", {"num_hidden_layers": 10**12}, "num_hidden_layers: expected a whole number from 1 to 4096"),
        ("llama-2-7b-hf", {"num_key_value_heads": 5}, "num_key_value_heads: expected a divisor"),
        ("llama-2-7b-hf", {"num_attention_heads": 33, "num_key_value_heads": 33}, "expected a divisor of 4096"),
        ("llama-2-7b-hf", {"torch_dtype": "bfloat61"}, "did you mean 'bfloat16'?"),
        (
            "llama-2-7b-hf",
            {"architectures": ["LlamaForCausalML"]},
            "'LlamaForCausalML'; did you mean 'LlamaForCausalLM'?",
        ),
        ("llama-2-7b-hf", {"architectures": None}, "missing key 'architectures'"),
        ("llama-2-7b-hf", {"architectures": "Llama"}, "architectures: expected a list of str"),
        ("llama-2-7b-hf", {"tie_word_embeddings": "no"}, "tie_word_embeddings: expected true or false"),
        ("llama-2-7b-hf", {"quantization_config": []}, "quantization_config: expected an object"),
        ("llama-2-7b-hf", {"quantization_config": {"quant_method": "gguf"}}, "quant_method: unsupported 'gguf'"),
        ("llama-2-7b-hf", {"quantization_config": {"quant_method": "awq", "bits": 3}}, "unsupported awq width 3"),
        ("mixtral-8x7b-v0.1", {"num_experts_per_tok": 9}, "num_experts_per_tok: expected at most"),
        ("openai--gpt-oss-20b", {"layer_types": ["full_attention"]}, "layer_types: expected 24 entries"),
        ("openai--gpt-oss-20b", {"layer_types": ["linear"] * 24}, "layer_types: unsupported 'linear'"),
        ("deepseek-ai--DeepSeek-V3", {"attention_bias": True}, "attention_bias: unsupported true"),
        ("deepseek-ai--DeepSeek-V4-Pro", {"compress_ratios": [4]}, "compress_ratios: expected 61 entries"),
        ("deepseek-ai--DeepSeek-V4-Pro", {"compress_ratios": [8] * 61}, "compress_ratios: expected 0, 4 or 128"),
        ("deepseek-ai--DeepSeek-V4-Pro", {"expert_dtype": "fp2"}, "expert_dtype: unsupported 'fp2'"),
        ("zai-org--GLM-5.2", {"indexer_types": ["full"]}, "indexer_types: expected 78 entries"),
        ("MiniMaxAI--MiniMax-M3", {"moe_layer_freq": [2] * 60}, "moe_layer_freq: expected 60 entries"),
        ("XiaomiMiMo--MiMo-V2-Flash", {"hybrid_layer_pattern": None}, "hybrid_layer_pattern: expected 48 entries"),
        ("nvidia--Nemotron-H-56B-Base-8K", {"num_hidden_layers": 7}, "num_hidden_layers: expected 118"),
        ("nvidia--Nemotron-H-56B-Base-8K", {"hybrid_override_pattern": "MX"}, "unsupported block 'X'"),
        ("nvidia--Llama-3_3-Nemotron-Super-49B-v1", {"block_configs": [1]}, "expected a list of objects"),
        ("nvidia--Llama-3_3-Nemotron-Super-49B-v1", {"block_configs": [{}]}, "block_configs: expected 80 entries"),
        ("moonshotai--Kimi-K3", {"text_config": 1}, "text_config: expected an object"),
        ("tiiuae--falcon-7b", {"num_kv_heads": 2, "new_decoder_architecture": True}, "num_kv_heads: expected a div"),
        ("openai-community--gpt2", {"n_head": 7}, "n_head: expected a divisor of 768"),
        ("mistralai--Mamba-Codestral-7B-v0.1", {"num_heads": 64}, "num_heads: expected num_heads x head_dim"),
        ("deepseek-ai--DeepSeek-V3", {"kv_lora_rank": 0}, "kv_lora_rank: expected a whole number from 1"),
    ],
)
def test_bad_configs_name_file_and_key(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        _model(_raw(name) | change)
    text = str(caught.value)
    assert text.startswith("config.json: ")
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"hidden_size": 4096, "vocab', "not valid JSON"),
        (b"\x93NUMPY\x00\x01\xff", "not UTF-8"),
        (b'{"hidden_size": NaN}', "expected finite numbers, got NaN"),
        (b'{"hidden_size": -Infinity}', "expected finite numbers, got -Infinity"),
        (b'{"architectures": ["LlamaForCausalLM"], "hidden_size": 1e999}', "expected finite numbers, got Infinity"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[1]", "expected a JSON object"),
        (b"", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON|nested too deeply"),
    ],
)
def test_broken_files(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=reason) as caught:
        load_model(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_an_unknown_architecture_is_told_how_many_are_known() -> None:
    with pytest.raises(InputError, match=rf"supported: LlamaForCausalLM, .*\({len(FAMILIES)} in all\)"):
        _model({"architectures": ["Something"]})


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats(allow_nan=False), st.text(max_size=8),
    st.lists(st.integers(-1, 64), max_size=3), st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)  # fmt: skip
# One model of every architecture: whatever stands anywhere in its config may be anything.
VICTIMS = sorted({catalog.model(name).architecture: name for name in MODELS}.values())


def _paths(content: dict[str, Any]) -> list[tuple[str, ...]]:
    """The way to each value of a config, through nested objects and the first entry of lists of objects."""
    found: list[tuple[str, ...]] = []
    for key, value in sorted(content.items()):
        found.append((key,))
        if isinstance(value, dict):
            found += [(key, *rest) for rest in _paths(value)]
    return found


def _replaced(content: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    head, *rest = path
    return content | {head: _replaced(content[head], tuple(rest), value) if rest else value}


def _refusal(content: dict[str, Any]) -> str:
    """What is said against a config; empty when it is read as a model with parameters."""
    try:
        read = total_params(_model(content))
    except InputError as error:
        return str(error)
    return "" if read > 0 else "a model without parameters\n"


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(VICTIMS), st.data())
def test_any_junk_value_is_read_or_refused_in_one_line(name: str, data: st.DataObject) -> None:
    raw = _raw(name)
    path = data.draw(st.sampled_from(_paths(raw)))
    refusal = _refusal(_replaced(raw, path, data.draw(JUNK)))
    assert len(refusal.splitlines()) <= 1
    assert not refusal.endswith("\n")


@pytest.mark.parametrize("name", VICTIMS)
def test_without_any_one_key_a_config_is_read_or_refused_in_one_line(name: str) -> None:
    raw = _raw(name)
    for path in _paths(raw):
        refusal = _refusal(_replaced(raw, path, None))
        assert not refusal or (refusal.startswith("config.json: ") and "\n" not in refusal), path
