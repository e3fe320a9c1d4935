"""Tables name devices, models, engines and formats in their own words: all of them are understood, or are a reason."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perfsim.spec import catalog
from validation.compare import facts, formats, inferencex, names, plans, silicon
from validation.compare.cli import compare
from validation.compare.facts import InexpressibleError
from validation.compare.kinds import KINDS
from validation.ops.predict import fitted_file, relative


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("h100_80gb_sxm", "h100-80gb-sxm"), ("H100-SXM-80GB", "h100-80gb-sxm"), ("A100-SXM4-80GB", "a100-80gb-sxm"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb-sxm"), ("NVIDIA H100-NVL-94GB", "h100-94gb-nvl"),
        ("a100_pcie", "a100-80gb-pcie"), ("RTX_4090", "rtx-4090-24gb"), ("NVIDIA GeForce RTX 4090", "rtx-4090-24gb"),
        ("RTXA6000", "rtx-a6000-48gb"), ("gb300_nvl72", "gb300-288gb"), ("b300_sxm", "b300-288gb-sxm"),
        ("AMD Instinct MI300X", "mi300x-192gb"), ("jetson_orin_nano_8gb_super", "jetson-orin-nano-super-8gb"),
    ],
)  # fmt: skip
def test_devices_by_the_words_of_their_names(name, device):
    assert facts.device(name) == device


@pytest.mark.parametrize("name", ["L40", "H100-PCIe-96GB", "v100_pcie_16gb", "B60", "sxm", "NVIDIA"])
def test_another_device_is_not_taken_for_a_near_one(name):
    """An L40 has half of the L40S's FLOP/s; what is not described at all is a reason."""
    with pytest.raises(InexpressibleError, match=f"no descriptor of device '{name}'"):
        facts.device(name)


@pytest.mark.parametrize(
    ("name", "model", "label"),
    [
        ("Qwen/Qwen3-32B-AWQ", "Qwen--Qwen3-32B", "int4_wo"),
        ("Qwen/Qwen3-14B-FP8", "qwen3-14b", "fp8"),
        ("RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w4a16", "meta-llama--Meta-Llama-3.1-8B", "int4_wo"),
        ("nvidia/DeepSeek-R1-0528-NVFP4-v2", "deepseek-ai--DeepSeek-R1", "nvfp4"),
        ("amd/Llama-3.1-405B-Instruct-FP8-KV", "meta-llama--Meta-Llama-3.1-405B", "fp8"),
        ("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-FP8", "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "fp8"),
        ("zai-org/GLM-5.2-FP8", "zai-org/GLM-5.2-FP8", "fp8"),
        ("another/DeepSeek-V4-Pro-FP8", "sgl-project--DeepSeek-V4-Pro-FP8", "fp8"),
        ("codellama/CodeLlama-34b-hf", "codellama-34b-instruct-hf", None),
        ("moonshotai/Kimi-K2-Instruct-0905", "moonshotai--Kimi-K2-Instruct", None),
        ("gptoss120b", "openai--gpt-oss-120b", None),
    ],
)
def test_checkpoints_by_the_shapes_that_their_names_say(name, model, label):
    assert facts.model(name) == model
    assert formats.format_of(name) == label


@pytest.mark.parametrize("name", ["deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "Qwen/Qwen2.5-72B-Instruct", "-FP8"])
def test_other_shapes_are_no_model_of_the_catalogue(name):
    with pytest.raises(InexpressibleError, match=f"no descriptor of model '{name}'"):
        facts.model(name)


def test_names_with_one_base_have_one_shape():
    """Else a quantised checkpoint would get the shapes of another model; `glm-5.2-fp8` is abridged."""
    shapes: dict[str, set[str]] = {}
    for name in catalog.list_models():
        arch = facts.arch(name)
        shape = [
            arch.hidden_size,
            arch.vocab_size,
            [(layer.count, layer.attention, layer.mlp) for layer in arch.layers],
        ]
        if name != "glm-5.2-fp8":
            shapes.setdefault(names.base_of(name), set()).add(str(shape))
    assert {base for base, found in shapes.items() if len(found) > 1} == set()


@pytest.mark.parametrize(
    ("model", "gemm", "moe", "changed"),
    [
        ("Qwen--Qwen3-32B", "fp8", None, {"linear_dtype": "fp8", "expert_dtype": "fp8"}),
        ("Qwen--Qwen3-32B", "bfloat16", None, {}),
        ("Qwen--Qwen3-32B", "int4_wo", None, {"linear_dtype": "int4", "expert_dtype": "int4", "weight_only": True}),
        ("Qwen--Qwen3-30B-A3B", "bfloat16", "fp8_block", {"linear_dtype": "bf16", "expert_dtype": "fp8_block"}),
        ("deepseek-ai--DeepSeek-R1", "fp8", "fp8", {}),
        ("deepseek-ai--DeepSeek-R1", "bfloat16", "bfloat16", {"linear_dtype": "bf16", "expert_dtype": "bf16"}),
        ("deepseek-ai--DeepSeek-R1", "nvfp4", "nvfp4",
         {"linear_dtype": "nvfp4", "expert_dtype": "nvfp4", "attention_dtype": "bf16"}),
        ("moonshotai--Kimi-K2.5", "nvfp4", "nvfp4",
         {"linear_dtype": "nvfp4", "expert_dtype": "nvfp4", "attention_dtype": "bf16", "weight_only": False}),
        ("moonshotai--Kimi-K2.5", "int4_wo", "int4_wo", {}),
        ("openai--gpt-oss-120b", "bfloat16", "w4a16_mxfp4", {}),
    ],
)  # fmt: skip
def test_stated_formats_replace_those_of_the_checkpoint(model, gemm, moe, changed):
    assert formats.weight_formats(model, gemm=gemm, moe=moe) == changed


def test_formats_that_are_not_known_or_do_not_go_together_are_reasons():
    with pytest.raises(InexpressibleError, match="weight format 'fp3' not known"):
        formats.weight_formats("Qwen--Qwen3-32B", gemm="fp3", moe=None)
    with pytest.raises(InexpressibleError, match="weights in fp8 beside experts in int4_wo"):
        formats.weight_formats("Qwen--Qwen3-30B-A3B", gemm="fp8", moe="int4_wo")


def test_the_format_in_a_name_is_not_lost_where_no_column_states_one():
    row = {"model": "Qwen/Qwen3-14B-AWQ", "framework": "vLLM", "parallel": "tp8", "isl": 100, "osl": 10, "conc": 2,
           "num_prompts": 4}  # fmt: skip
    assert dict(inferencex.position_question(row).formats)["linear_dtype"] == "int4"
    assert inferencex.position_question({**row, "model": "Qwen/Qwen3-14B"}).formats == ()


def test_engines_in_other_words():
    assert [plans.engine(name) for name in ("vLLM", "SGLang", "TensorRT-LLM", "dynamo_trtllm", "mori-sglang")] == [
        "vllm", "sglang", "trtllm", "trtllm", "sglang"]  # fmt: skip
    with pytest.raises(InexpressibleError, match="no profile of engine 'atom'"):
        plans.engine("atom")


def test_a_run_of_an_earlier_day_had_an_earlier_version():
    assert facts.version_of("vllm", None, date="2025-11-02")["async_scheduling"] is False
    assert facts.version_of("vllm", "0.15.1", date="2025-11-02")["async_scheduling"] is True
    for date in (None, "2026-03-01"):
        with pytest.raises(InexpressibleError, match="version not published"):
            facts.version_of("vllm", None, date=date)


SILICON = {
    "backend": "trtllm", "backend_version": "1.3.0", "model_path": "openai/gpt-oss-120b", "system": "h100_sxm",
    "mode": "agg", "isl": 1000, "osl": 100, "concurrency": 8, "tp_size": 4, "attention_dp_size": None, "moe_tp_size": 4,
    "moe_ep_size": 1, "pp_size": 1, "origin": "nvidia_gap_analysis", "silicon_ttft_ms": 10.0, "silicon_tpot_ms": 10.0,
}  # fmt: skip


def test_ranks_follow_where_experts_are_on_the_gpus_of_one():
    assert '"dp": 1, "ep": 1' in silicon.question_of(SILICON).content
    with pytest.raises(InexpressibleError, match="attention_dp_size of a mixture of experts"):
        silicon.question_of({**SILICON, "moe_tp_size": 8})


def test_tables_without_rows_of_every_kind(tmp_path):
    """The form of the answer is that of any table."""
    for kind in KINDS:
        path = tmp_path / "t.parquet"
        pq.write_table(pa.table({name: pa.array([], pa.string()) for name in sorted(kind.columns)}), path)
        assert compare(path) == {"table": "t.parquet", "rows": 0, "expressible": 0, "not_expressible": {},
                                 "metrics": {}, "groups": {}}  # fmt: skip


KERNELS = {
    "system": "b200_sxm", "framework": "vllm", "version": "1", "gemm_dtype": "fp8_block", "m": 16, "n": 4096, "k": 4096,
    "latency_us": 100.0,
}  # fmt: skip
EXCHANGE = {
    "source": "aiconfigurator", "system": "b200_sxm", "library": "framework_allreduce", "framework": "vllm",
    "version": "1", "op_name": "all_reduce", "impl": "vllm_eager", "num_nodes": 1, "num_gpus": 8, "bytes": 4096,
    "latency_us": 10.0,
}  # fmt: skip


@pytest.mark.parametrize("row", [KERNELS, EXCHANGE])
@pytest.mark.parametrize(("system", "other"), [("b200_sxm", "b300_sxm"), ("gb200", "gb300")])
def test_a_device_that_nobody_timed_is_timed_as_its_relative_was(tmp_path, row, system, other):
    """Same family, memory and links: an eager launch, most of such a small kernel's time, is not forgotten."""
    assert relative(facts.device(other)) == facts.device(system)
    assert fitted_file(facts.device(other)) is None
    times = []
    for name in (system, other):
        pq.write_table(
            pa.table({key: [value] for key, value in {**row, "system": name}.items()}), tmp_path / "t.parquet"
        )
        times.append(1 + compare(tmp_path / "t.parquet")["metrics"]["latency_us"]["bias"])
    assert times[1] == pytest.approx(times[0], rel=0.15)


def test_what_its_nearest_relative_was_not_timed_for_is_taken_from_the_next(tmp_path):
    """Nobody timed quantisation on a GB200; a GB300 then quantises as a B200 does, whose memory it has."""
    row = {"framework": "sglang", "version": "1", "op": "computescale", "quant_dtype": "fp8", "m": 4096, "k": 4096,
           "latency_us": 100.0}  # fmt: skip
    times = []
    for name in ("b200_sxm", "gb300"):
        pq.write_table(pa.Table.from_pylist([{"system": name, **row}]), tmp_path / "t.parquet")
        times.append(1 + compare(tmp_path / "t.parquet")["metrics"]["latency_us"]["bias"])
    assert times[1] == pytest.approx(times[0], rel=0.05)


def test_between_nodes_without_network_cards_nothing_is_predicted(tmp_path):
    row = {**EXCHANGE, "system": "h20_sxm", "impl": "NCCL", "num_nodes": 2, "num_gpus": 16}
    pq.write_table(pa.table({key: [value] for key, value in row.items()}), tmp_path / "t.parquet")
    found = compare(tmp_path / "t.parquet")
    assert found["not_expressible"] == {"network between nodes of 'h20_sxm' not published": 1}


def test_recurrent_layers_do_not_say_how_far_attention_is_sharded():
    """Qwen3.5's linear attention has no count of query heads; 32 heads of its other layers fit 8 GPUs, 6 do not."""
    plan = {"tp": 8, "dp": 1, "ep": 1, "pp": 1, "gpus": 8}
    plans.check_size(plan, accelerator="h200-141gb-sxm", model="Qwen--Qwen3.5-397B-A17B")
    with pytest.raises(InexpressibleError, match="tp counts all GPUs"):
        plans.check_size({**plan, "tp": 6}, accelerator="h200-141gb-sxm", model="Qwen--Qwen3.5-397B-A17B")


def test_ranks_of_a_dense_model_are_workers_behind_a_prefill_side_too():
    plan = {"tp": 2, "dp": 4, "ep": 1, "pp": 1, "gpus": 8}
    found = silicon.group("decode", 3, plan, {}, model="Qwen--Qwen3-32B")
    assert (found["count"], found["parallel"]) == (12, {"tp": 2, "dp": 1, "ep": 1, "pp": 1})
    found = silicon.group("decode", 3, plan, {}, model="deepseek-ai--DeepSeek-R1")
    assert (found["count"], found["parallel"]["dp"]) == (3, 4)


def test_one_row_that_fits_no_machine_is_a_reason_and_not_the_end(tmp_path):
    rows = [EXCHANGE, {**EXCHANGE, "impl": "NCCL", "num_gpus": 1 << 14}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    found = compare(tmp_path / "t.parquet")
    assert (found["rows"], found["expressible"]) == (2, 1)
    assert next(iter(found["not_expressible"])).startswith("infeasible: 16384 GPUs")


def test_columns_that_are_not_required_may_be_of_any_type(tmp_path):
    row = {"system": "h100_sxm", "framework": "vllm", "version": "1", "phase": "decode_module", "mla_dtype": "bfloat16",
           "model": "deepseek-ai/DeepSeek-V3", "gemm_type": "bfloat16", "kv_cache_dtype": "bfloat16", "num_heads": 16,
           "batch_size": 4, "isl": 1, "step": 1000, "latency_us": 100.0}  # fmt: skip
    table = pa.Table.from_pylist([row])
    answers = []
    for kind in (pa.string(), pa.binary(), pa.string_view()):
        names = [pa.field(name, kind if pa.types.is_string(of) else of) for name, of in
                 zip(table.schema.names, table.schema.types, strict=True)]  # fmt: skip
        pq.write_table(table.cast(pa.schema(names)), tmp_path / "t.parquet")
        answers.append(compare(tmp_path / "t.parquet"))
    assert answers[0]["expressible"] == 1
    assert answers[1] == answers[2] == answers[0]


def test_curves_of_rows_that_were_not_repeated_have_no_conditions_of_a_benchmark(tmp_path):
    """The RTX 4090's prompts were timed once each, in an engine's step: no share of the L2 cache is known."""
    row = {"system": "rtx4090", "framework": "vllm", "version": "1", "attn_dtype": "bfloat16",
           "kv_cache_dtype": "bfloat16", "head_dim": 128, "window_size": 0, "num_heads": 32, "num_key_value_heads": 8,
           "isl": 1024, "batch_size": 2, "step": 0, "latency_us": 300.0}  # fmt: skip
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "t.parquet")
    found = compare(tmp_path / "t.parquet")
    assert found["expressible"] == 1
    flops = 4 * 2 * 32 * 128 * 1024 * 1024 / 2
    assert 300.0 * (1 + found["metrics"]["latency_us"]["bias"]) > 1e6 * flops / 165.2e12  # dense bf16 of the datasheet


def test_four_bit_weights_are_multiplied_in_eight_bits_where_the_label_says_so(tmp_path):
    """Not below the time of light in FP8, and well below what 16-bit activations take with such weights."""
    row = {"system": "b200_sxm", "framework": "vllm", "version": "1", "moe_dtype": "w4a8_mxfp4_mxfp8",
           "kernel_source": "fused", "distribution": "balanced", "hidden_size": 4096, "inter_size": 2048, "topk": 8,
           "num_experts": 128, "moe_tp_size": 1, "moe_ep_size": 1, "num_tokens": 65536,
           "latency_us": 1000.0}  # fmt: skip
    times = {}
    for label in ("w4a8_mxfp4_mxfp8", "w4a16_mxfp4"):
        pq.write_table(pa.Table.from_pylist([{**row, "moe_dtype": label}]), tmp_path / "t.parquet")
        times[label] = 1e-3 * (1 + compare(tmp_path / "t.parquet")["metrics"]["latency_us"]["bias"])
    flops = 6 * 65536 * 8 * 4096 * 2048
    assert flops / 4.5e15 < times["w4a8_mxfp4_mxfp8"] < 0.7 * times["w4a16_mxfp4"]
