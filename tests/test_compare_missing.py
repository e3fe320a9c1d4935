"""Facts that a table leaves out or states wrongly: a reason in each row that needs them, no default."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from validation.compare import facts, inferencex, isim, silicon
from validation.compare.ask import MOST_REQUESTS, answer, ask
from validation.compare.cli import PIPE_CLOSED, compare
from validation.compare.facts import InexpressibleError
from validation.compare.table import read_table

LLAMA, QWEN = "meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen2.5-7B-Instruct"
STAGE = {
    "experiment": "one", "model": LLAMA, "hardware": "H100", "tp": 1, "dp": None, "precision": "FP16",
    "cpu_offload": False, "gpu_mem_util": 0.9, "max_num_batched_tokens": 2048, "max_num_seqs": 128,
    "total_kv_blocks": None, "cpu_kv_blocks": None, "same_run_as": None, "stage_index": -1, "system_prompt_len": 100,
    "question_len": 447, "output_len": 20, "stages": "[[4.0, 5], [8.0, 5]]", "e2e_mean_ms": 300.0, "ttft_mean_ms": 40.0,
    "tpot_derived_ms": 8.0, "requests_per_s": 4.0, "input_tokens_per_s": None, "n_success": 60.0,
}  # fmt: skip
SAMPLE = {
    "backend": "vllm", "backend_version": "0.12.0", "model_path": "Qwen/Qwen3-32B", "system": "h100_sxm",
    "precision": "fp8", "mode": "agg", "isl": 1024, "osl": 64, "gemm_quant_mode": "fp8", "moe_quant_mode": "fp8",
    "tp_size": 2.0, "pp_size": 1.0, "attention_dp_size": None, "moe_tp_size": 1.0, "moe_ep_size": 1.0,
    "concurrency": 8.0, "silicon_ttft_ms": 100.0, "silicon_tpot_ms": 13.0, "origin": "nvidia_gap_analysis",
    "measured": None, "exact_duplicate": False, "same_config_tpot_spread": 1.0,
}  # fmt: skip
DRAFTED = {
    **SAMPLE, "backend": "sglang", "backend_version": "0.5.6", "model_path": "deepseek-ai/DeepSeek-R1",
    "system": "b200_sxm", "measured": "2026-03-25", "origin": "inferencex_export_csv", "tp_size": 8.0,
    "moe_tp_size": 8.0, "attention_dp_size": 1.0,
}  # fmt: skip
POINT = {
    "hardware": "h200", "framework": "trt", "model": "dsr1", "precision": "fp8", "spec_method": "none",
    "disagg": False, "prefill_tp": 8, "prefill_ep": 1, "prefill_dp_attention": False, "decode_tp": 8, "decode_ep": 1,
    "decode_dp_attention": False, "isl": 1024, "osl": 128, "conc": 4, "image": "tensorrt-llm/release:1.1.0",
    "median_ttft": 0.2, "median_tpot": 0.011,
}  # fmt: skip


def write(path, rows: list[dict[str, Any]]):
    pq.write_table(pa.table({name: pa.array([row[name] for row in rows]) for name in rows[0]}), path)
    return path


def requests(count: int = 12, **changes: object) -> list[dict[str, Any]]:
    return [
        {"hardware": "RTXPRO6000", "model": "meta-llama/Llama-3.1-8B", "vllm_version": "0.19.0", "tp": 1, "dp": 1,
         "ep": False, "max_num_seqs": 128, "max_num_batched_tokens": 2048, "num_kv_tokens": 41_600.0,
         "prefix_caching": True, "request_index": index, "arrival_s": 0.1 * index, "queued_engine_s": 0.1 * index,
         "prompt_tokens": 100 + index, "output_tokens": 40, "hash_block_ids": list(range((100 + index) // 16)),
         "ttft_s": 0.05, "tpot_s": 0.013, "e2e_s": 0.05 + 39 * 0.013, **changes}
        for index in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize(("column", "value", "reason"), [
    ("hash_block_ids", None, "which blocks of prompts are equal"),
    ("hash_block_ids", [1], "which blocks of prompts are equal"),
    ("queued_engine_s", None, "when requests were sent"),
    ("queued_engine_s", -1.0, "when requests were sent"),
    ("request_index", 1, "requests of several runs with one deployment"),
])  # fmt: skip
def test_one_request_without_its_load_is_the_reason_of_its_run(tmp_path, column, value, reason):
    rows = requests()
    rows[0][column] = value
    found = compare(write(tmp_path / "t.parquet", rows), bands=False)
    assert found["not_expressible"] == {f"load not published: {reason}": 12}


def test_prompts_that_nobody_caches_need_no_ids(tmp_path):
    rows = requests(prefix_caching=False, hash_block_ids=None)
    assert compare(write(tmp_path / "t.parquet", rows), bands=False)["expressible"] == 12


def test_experts_need_their_plan(tmp_path):
    rows = requests(model="Qwen/Qwen3-30B-A3B-Instruct-2507", ep=None)
    found = compare(write(tmp_path / "t.parquet", rows), bands=False)
    assert found["not_expressible"] == {"plan not published: whether experts are spread": 12}


def test_the_last_token_has_the_band_of_the_client_s(tmp_path):
    metrics = compare(write(tmp_path / "t.parquet", requests()))["metrics"]
    for statistic in ("mean", "p50", "p99"):
        assert 0.01 < metrics[f"e2e_s:{statistic}"]["band_width_median"] < 2.0


def once(rows: list[dict[str, Any]], tmp_path) -> list[dict[str, Any]]:
    return isim._once(read_table(write(tmp_path / "t.parquet", rows))).rows()


@pytest.mark.parametrize("name", [None, "one"])
def test_runs_without_a_name_of_their_own_stay_apart(tmp_path, name):
    rows = [{**STAGE, "experiment": name, "model": model, "stage_index": stage}
            for model in (LLAMA, QWEN) for stage in (-1, 0, 1)]  # fmt: skip
    assert once(rows, tmp_path) == rows
    assert len(once([*rows, *rows], tmp_path)) == 12  # nothing says that the second run is the first one


def test_a_run_that_is_told_twice_counts_once(tmp_path):
    again = {**STAGE, "experiment": "two", "same_run_as": "one", "gpu_mem_util": None, "e2e_mean_ms": 300.1}
    other = {**again, "model": QWEN}
    assert once([again, STAGE, other], tmp_path) == [STAGE, other]  # the raw run; one of another model is another
    assert once([again, {**again, "experiment": "three"}], tmp_path) == [again]
    unstaged = {**again, "stage_index": None}
    assert len(once([unstaged, unstaged], tmp_path)) == 2


def prompts(rows: list[dict[str, Any]]) -> list[int]:
    questions, _ = isim._questions(rows)
    return [json.loads(question.content)["workload"]["prompt"]["tokens"] for question in questions]


def test_lengths_of_a_run_are_not_those_of_another_of_its_name():
    whole = {**STAGE, "input_tokens_per_s": 2400.0}
    assert prompts([whole, {**STAGE, "stage_index": 0}]) == [600, 600]
    for changed in ({"model": QWEN}, {"experiment": None}):
        alone = {**STAGE, "stage_index": 0, **changed}
        assert prompts([{**whole, **({} if "model" in changed else changed)}, alone]) == [600, *prompts([alone])]
        assert prompts([alone]) != [600]


def test_rates_that_are_none_say_nothing_about_lengths():
    usual = prompts([STAGE])
    for tokens, rate in ((-2400.0, 4.0), (0.0, 4.0), (1e300, 1e-300), (2400.0, -4.0)):
        assert prompts([{**STAGE, "input_tokens_per_s": tokens, "requests_per_s": rate}]) == usual


def test_requests_of_a_name_that_two_deployments_have(tmp_path):
    log = [{"experiment": "one", "request_index": index, "arrival_s": 0.2 * index, "input_tokens": 600,
            "output_tokens_configured": 20, "ttft_s": 0.03, "e2e_s": 0.2, "has_error": False}
           for index in range(8)]  # fmt: skip
    path = write(tmp_path / "requests.parquet", log)
    write(tmp_path / "stages.parquet", [STAGE, {**STAGE, "stage_index": 0}])
    assert compare(path, bands=False)["expressible"] == 8
    write(tmp_path / "stages.parquet", [STAGE, {**STAGE, "tp": 2}])
    assert compare(path, bands=False)["not_expressible"] == {"deployment not published: runs of this name differ": 8}
    write(tmp_path / "stages.parquet", [{**STAGE, "experiment": None}])
    write(path, [{**row, "experiment": None} for row in log])
    assert compare(path, bands=False)["not_expressible"] == {"deployment not published: no name of the run": 8}


@pytest.mark.parametrize(("column", "value", "reason"), [
    ("arrival_s", None, "no value of arrival_s of some request"),
    ("output_tokens_configured", 0, "no value of output_tokens_configured of some request"),
    ("input_tokens", None, "no value of input_tokens of some request"),
    ("request_index", 1, "requests of several runs under one name"),
    ("request_index", 0.5, "no value of request_index of some request"),
])  # fmt: skip
def test_a_log_with_a_gap_is_not_replaced_by_the_configured_load(tmp_path, column, value, reason):
    log = [{"experiment": "one", "request_index": index, "arrival_s": 0.2 * index, "input_tokens": 600,
            "output_tokens_configured": 20, "ttft_s": 0.03, "e2e_s": 0.2, "has_error": False}
           for index in range(8)]  # fmt: skip
    log[0][column] = value
    write(tmp_path / "stages.parquet", [STAGE])
    found = compare(write(tmp_path / "requests.parquet", log), bands=False)
    assert found["not_expressible"] == {f"load not published: {reason}": 8}


def test_a_prompt_that_was_sent_again_has_its_length():
    lengths = isim._filled(np.array([500.0, np.nan, 600.0, np.nan]), np.array([0.0, 0.0, 1.0, 2.0]))
    assert lengths[:3].tolist() == [500.0, 500.0, 600.0]
    assert np.isnan(lengths[3])


MEASURED = {"e2e_mean_ms", "ttft_mean_ms", "tpot_derived_ms", "requests_per_s", "n_success"}


@pytest.mark.parametrize("value", [None, -1.0, 0.0])
def test_rows_without_a_measured_value_say_so(tmp_path, value):
    found = compare(write(tmp_path / "t.parquet", [{**STAGE, **dict.fromkeys(MEASURED, value)}]), bands=False)
    assert found["not_expressible"] == {"no measured value": 1}
    rows = requests(ttft_s=value, tpot_s=value, e2e_s=value)
    assert compare(write(tmp_path / "t.parquet", rows), bands=False)["not_expressible"] == {"no measured value": 12}
    rows = requests()
    rows[3] |= dict.fromkeys(("ttft_s", "tpot_s", "e2e_s"), value)
    assert compare(write(tmp_path / "t.parquet", rows), bands=False)["not_expressible"] == {"no measured value": 1}


@pytest.mark.parametrize(("changes", "reason"), [
    (dict.fromkeys(("running", "waiting", "gen_throughput", "kv_cache_pct")), "no measured value"),
    ({"t": -1.0}, "no value of t published"), ({"t": 1e300}, "no value of t published"),
])  # fmt: skip
def test_seconds_without_a_state_or_a_time(tmp_path, changes, reason):
    second = {"hardware": "RTXPRO6000", "model": "meta-llama/Llama-3.1-8B", "t": 1.0, "prompt_throughput": 0.0,
              "gen_throughput": 300.0, "running": 4.0, "waiting": 0.0, "kv_cache_pct": 2.0}  # fmt: skip
    write(tmp_path / "requests.parquet", requests())
    found = compare(write(tmp_path / "t.parquet", [second, {**second, **changes}]))
    assert found["not_expressible"] == {reason: 1}


def test_the_rate_of_an_open_loop_has_no_band(tmp_path):
    metrics = compare(write(tmp_path / "t.parquet", [STAGE]))["metrics"]
    assert metrics["requests_per_s"]["coverage_90"] is metrics["requests_per_s"]["band_width_median"] is None
    assert metrics["e2e_mean_ms"]["band_width_median"] > 0.01


@pytest.mark.parametrize(("changes", "reason"), [
    ({"dp": 0}, "plan not published"), ({"tp": 1.5}, "plan not published"),
    ({"total_kv_blocks": 0}, "no value of total_kv_blocks published"),
    ({"total_kv_blocks": 9000, "cpu_offload": None}, "KV offload not published"),
    ({"cpu_kv_blocks": -1}, "no value of cpu_kv_blocks published"),
    ({"stages": "[]"}, "stages are no pairs of rate and seconds"),
    ({"stages": "[[-4.0, 5]]"}, "stages are no pairs of rate and seconds"),
])  # fmt: skip
def test_numbers_of_no_deployment_are_reasons(changes, reason):
    with pytest.raises(InexpressibleError, match=reason):
        isim.question_of({**STAGE, **changes})


@pytest.mark.parametrize("column", ["measured", "precision"])
def test_rows_that_may_be_of_a_sweep_with_drafts(column):
    with pytest.raises(InexpressibleError, match="some runs of the sweep did"):
        silicon.question_of(DRAFTED)
    for value in (None, ""):
        with pytest.raises(InexpressibleError, match="whether tokens were drafted not published: some sweeps did, no"):
            silicon.question_of({**DRAFTED, column: value})
    silicon.question_of({**DRAFTED, "measured": "2025-11-02"})
    silicon.question_of({**DRAFTED, "origin": "inferencex_db_dump_2026-04-27", "measured": None})


def test_sweeps_are_known_by_other_words_for_the_same():
    for changes in ({"system": "NVIDIA B200 SXM"}, {"model_path": "deepseek-ai/DeepSeek-R1-0528"},
                    {"measured": "2026-03-25 00:00:00"}, {"precision": "FP8"}):  # fmt: skip
        with pytest.raises(InexpressibleError, match="some runs of the sweep did"):
            silicon.question_of({**DRAFTED, **changes})


def test_plans_of_a_day_that_is_not_known_may_be_placeholders():
    row = {**DRAFTED, "mode": "disagg", "system": "gb200", "measured": None}
    with pytest.raises(InexpressibleError, match="sizes are placeholders in some sweeps, no date"):
        facts.check_plan(row, engine="sglang")
    facts.check_plan(row, engine="trtllm")


def formats(**changes: object) -> dict[str, str | bool]:
    return dict(silicon.question_of({**SAMPLE, **changes}).formats)


def test_a_precision_says_the_formats_where_one_fits():
    nothing = {"gemm_quant_mode": None, "moe_quant_mode": None}
    assert formats(**nothing, precision="fp4")["linear_dtype"] == "nvfp4"
    assert formats(**nothing, precision="bfloat16") == formats(**nothing, precision=None) == {}
    eight = {"linear_dtype": "fp8", "expert_dtype": "fp8"}
    assert formats(**nothing, model_path="nvidia/Qwen3-32B-FP8", precision="FP8") == eight
    assert formats(**nothing, model_path="Qwen/Qwen3-32B-FP8") == {}  # its own
    for changes in (nothing, {"gemm_quant_mode": None}):
        with pytest.raises(InexpressibleError, match="weight formats not published: no gemm_quant_mode"):
            formats(**changes)  # 8 bits per tensor or in blocks
    experts = {"backend": "sglang", "model_path": "deepseek-ai/DeepSeek-R1", "system": "h200_sxm", "tp_size": 8.0,
               "moe_tp_size": 8.0, "attention_dp_size": 1.0}  # fmt: skip
    assert formats(**experts, **nothing) == {}
    with pytest.raises(InexpressibleError, match="weight formats not published: no moe_quant_mode"):
        formats(**experts, moe_quant_mode=None, precision=None)


@pytest.mark.parametrize(("changes", "reason"), [
    ({"precision": "fp3"}, "precision 'fp3' not known"),
    ({"precision": "fp4"}, "precision 'fp4' and weights in fp8 do not go together"),
    ({"origin": None}, "load not published: lengths depend on the origin"),
    ({"origin": "elsewhere"}, "origin 'elsewhere' not known"),
    ({"pp_size": None}, "plan not published: pp_size"), ({"pp_size": -1.0}, "plan not published: pp_size"),
    ({"attention_dp_size": -2.0}, "plan not published"), ({"moe_ep_size": 0.5}, "plan not published"),
    ({"same_config_tpot_spread": None}, "no value of same_config_tpot_spread"),
    ({"exact_duplicate": None}, "whether the row repeats another one not published"),
])  # fmt: skip
def test_silicon_facts_that_are_missing_or_wrong_are_reasons(changes, reason):
    silicon.question_of(SAMPLE)
    with pytest.raises(InexpressibleError, match=reason):
        silicon.question_of({**SAMPLE, **changes})


def test_deployments_that_may_be_split_are_not_taken_as_whole():
    inferencex.question_of(POINT)
    with pytest.raises(InexpressibleError, match="plan not published: whether prefill and decode are split"):
        inferencex.question_of({**POINT, "disagg": None})


ATTENTION = {
    "system": "h100_sxm", "framework": "vllm", "version": "1", "attn_dtype": "bfloat16", "kv_cache_dtype": "bfloat16",
    "head_dim": 128, "window_size": 0, "num_heads": 32, "num_key_value_heads": 8, "isl": 1, "batch_size": 16,
    "step": 4095, "latency_us": 100.0,
}  # fmt: skip


def test_heads_and_windows_of_attention_are_stated_or_a_reason(tmp_path):
    rows = [ATTENTION, {**ATTENTION, "num_key_value_heads": None}, {**ATTENTION, "window_size": None},
            {**ATTENTION, "num_key_value_heads": 0}]  # fmt: skip
    found = compare(write(tmp_path / "t.parquet", rows))
    assert found["not_expressible"] == {
        "no value of num_key_value_heads published": 1, "no value of window_size published": 1,
    }  # fmt: skip
    grouped, multi = (found["groups"]["num_key_value_heads"][heads]["latency_us"]["bias"] + 1 for heads in ("8", "0"))
    assert 3 < multi / grouped < 4.5  # four times as many bytes


def test_a_row_without_its_length_does_not_change_what_the_others_are(tmp_path):
    def bias(rows):
        return compare(write(tmp_path / "t.parquet", rows))["metrics"]["latency_us"]["bias"]

    alone = bias([ATTENTION])
    assert bias([ATTENTION, {**ATTENTION, "isl": None}]) == alone
    prefill = {**ATTENTION, "isl": 1024, "step": 0}
    assert 2 * bias([ATTENTION, prefill]) == pytest.approx(alone + bias([prefill]))


def test_weights_that_the_default_share_does_not_hold_had_another_one():
    """170 GB of 193 per GPU, of which SGLang takes 162 unless it is told otherwise."""
    row = {**DRAFTED, "model_path": "deepseek-ai/DeepSeek-V3", "origin": "inferencex_db_dump_2026-04-27", "osl": 16,
           "tp_size": 4.0, "moe_tp_size": 4.0, "moe_quant_mode": "fp8_block"}  # fmt: skip
    assert answer(silicon.question_of(row), bands=False).refused == (
        "share of memory for weights and KV cache not published: they do not fit the default one"
    )
    two = answer(silicon.question_of({**row, "tp_size": 2.0, "moe_tp_size": 2.0}), bands=False)
    assert two.refused == "infeasible: HBM capacity"


def test_a_load_that_would_never_end_is_a_reason():
    workload = {"kind": "synthetic", "num_requests": MOST_REQUESTS + 1}
    assert answer(ask({"workload": workload})).refused == "not simulated: more than 10,000,000 requests"
    groups = {"groups": [{"name": "rank", "count": 1 << 50}]}
    found = answer(ask({"workload": {"kind": "trace"}, "deployment": groups}))
    assert found.refused == "not simulated: more than 10,000 replicas"


def test_a_reader_that_has_gone_ends_it_quietly(tmp_path):
    path = write(tmp_path / "t.parquet", [{**ATTENTION, "step": 1000 + index} for index in range(20)])
    command = [sys.executable, "-m", "validation.compare", "--table", str(path), "--format", "json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == "20/20 rows\n"
        assert process.wait() == PIPE_CLOSED
