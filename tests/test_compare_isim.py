"""Load tests of inference-sim that were made up: what is deployed, how it is driven, and runs that lose requests."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from validation.compare.ask import Answer
from validation.compare.bands import Bands
from validation.compare.cli import compare
from validation.compare.facts import InexpressibleError
from validation.compare.isim import compare_stages, question_of
from validation.compare.table import read_table

STAGES = [[4.0, 5], [8.0, 5]]


def row(**changes: object) -> dict[str, Any]:
    return {
        "experiment": "one", "model": "meta-llama/Llama-3.1-8B-Instruct", "hardware": "H100", "tp": 1, "dp": 1.0,
        "precision": "FP16", "cpu_offload": False, "gpu_mem_util": 0.9, "max_num_batched_tokens": 2048,
        "max_num_seqs": 128, "total_kv_blocks": None, "cpu_kv_blocks": None, "same_run_as": None, "stage_index": -1,
        "system_prompt_len": 100, "question_len": 447, "output_len": 20, "stages": json.dumps(STAGES),
        "e2e_mean_ms": 300.0, "ttft_mean_ms": 40.0, "tpot_derived_ms": 8.0, "requests_per_s": 4.0, "n_success": 60.0,
        **changes,
    }  # fmt: skip


def write(path, rows: list[dict[str, Any]]):
    pq.write_table(pa.table({name: pa.array([row[name] for row in rows]) for name in rows[0]}), path)
    return path


def asked(**changes: object) -> dict[str, Any]:
    return dict(json.loads(question_of(row(**changes)).content))


def test_clients_give_up_and_models_say_how_to_sample() -> None:
    assert asked()["workload"]["timeout"] == 300
    models = {"meta-llama/Llama-3.1-8B-Instruct": "sorted", "codellama/CodeLlama-34b-Instruct-hf": "plain",
              "mistralai/Mixtral-8x7B-v0.1": "plain", "Qwen/Qwen2.5-7B-Instruct": "sorted"}  # fmt: skip
    assert {name: asked(model=name)["policy"]["sampling"] for name in models} == models


def test_the_host_tier_is_as_large_as_its_log_says_else_8_gib_for_all_gpus() -> None:
    """Mistral Nemo keeps 40 layers x 8 heads x 128 x 2 x 2 bytes per token; 16 tokens are a block."""
    nemo = {"model": "mistralai/Mistral-Nemo-Instruct-2407", "tp": 2}
    counted = asked(**nemo, total_kv_blocks=48009.0, cpu_kv_blocks=6553.0)["policy"]["kv_offload"]["capacity"]
    assert counted == 6553 * 40 * 8 * 128 * 2 * 2 * 16
    assert asked(**nemo, cpu_offload=True)["policy"]["kv_offload"]["capacity"] == 8 * 2**30
    assert "kv_offload" not in asked(**nemo)["policy"]


def answered(index: list[int], arrival: list[float], e2e: list[float]) -> Answer:
    found = {"request_index": index, "arrival_s": arrival, "e2e_s": e2e, "ttft_s": [0.1] * len(e2e),
             "tpot_s": [0.01] * len(e2e)}  # fmt: skip
    return Answer({}, {}, Bands({}), {name: np.array(values, dtype=float) for name, values in found.items()})


def test_a_stage_lasts_until_the_last_client_gave_up(tmp_path) -> None:
    """Of 40 requests in the second stage of 5 seconds, those at its end were not answered within 300 seconds."""
    first = [index / 4 for index in range(20)]
    second = [10 + index / 8 for index in range(30)]
    answer = answered(list(range(50)), first + second, [1.0] * 20 + [250.0] * 30)
    table = read_table(write(tmp_path / "stages.parquet", [row(), row(stage_index=0), row(stage_index=1)]))
    _, outcome = compare_stages(table, solve=lambda questions: dict.fromkeys(questions, answer))
    assert outcome.values["n_success"].predicted.tolist() == [50, 20, 30]
    whole, early, late = outcome.values["requests_per_s"].predicted
    assert early == pytest.approx(20 / (4.75 + 1.0))
    assert late == pytest.approx(30 / (5 + 300))
    assert whole == pytest.approx(50 / (10 + 5 + 300))
    assert outcome.values["e2e_mean_ms"].predicted[2] == pytest.approx(250e3)


def test_a_stage_without_an_answer_has_no_latencies(tmp_path) -> None:
    table = read_table(write(tmp_path / "stages.parquet", [row(), row(stage_index=1)]))
    answer = answered(list(range(20)), [index / 4 for index in range(20)], [1.0] * 20)
    _, outcome = compare_stages(table, solve=lambda questions: dict.fromkeys(questions, answer))
    assert outcome.values["n_success"].predicted.tolist() == [20, 0]
    assert outcome.values["ttft_mean_ms"].rows.tolist() == [0]


def test_requests_are_sent_when_they_were_with_their_own_lengths(tmp_path) -> None:
    """Each of 100 prompts comes back after 100 others and is found in the cache but for its last block."""
    write(tmp_path / "stages.parquet", [row()])
    rng = np.random.default_rng(2)
    lengths = rng.integers(500, 640, 100)
    rows = [
        {"experiment": "one", "request_index": index, "arrival_s": 0.15 * index,
         "output_tokens_configured": 20, "ttft_s": 0.03, "e2e_s": 0.18, "has_error": False,
         "input_tokens": int(lengths[index % 100])}
        for index in range(300)
    ]  # fmt: skip
    found = compare(write(tmp_path / "requests.parquet", rows))
    assert (found["rows"], found["expressible"]) == (300, 300)
    predicted = {level: 0.03 * (1 + found["metrics"][f"ttft_s:{level}"]["bias"]) for level in ("p50", "p99")}
    cold = 500 * 2 * 8e9 / 989e12  # seconds of a prompt's arithmetic at the peak of an H100
    weights = 2 * 8e9 / 3.35e12  # seconds that both kinds of steps read them for, hidden behind the arithmetic
    assert predicted["p99"] - predicted["p50"] > cold - weights  # a third of the prompts are new
    assert predicted["p50"] < 0.03


@pytest.mark.parametrize("stage", [None, 2, -2])
def test_a_stage_that_was_not_sent_is_the_reason_of_its_row_alone(stage: int | None, tmp_path) -> None:
    table = read_table(write(tmp_path / "stages.parquet", [row(), row(stage_index=stage)]))
    answer = answered(list(range(20)), [index / 4 for index in range(20)], [1.0] * 20)
    _, outcome = compare_stages(table, solve=lambda questions: dict.fromkeys(questions, answer))
    assert outcome.reasons[0] is None
    assert outcome.reasons[1] in ("no value of stage_index published", "load not published: no such stage")


@pytest.mark.parametrize("column", [
    "model", "hardware", "tp", "precision", "max_num_batched_tokens", "max_num_seqs", "output_len", "stages",
])  # fmt: skip
def test_a_missing_fact_is_the_reason_of_its_row_alone(column: str, tmp_path) -> None:
    table = read_table(write(tmp_path / "stages.parquet", [row(), row(experiment="two", **{column: None})]))
    _, missing = table.rows()
    with pytest.raises(InexpressibleError, match=r"no |not "):
        question_of(missing)
    _, outcome = compare_stages(table)
    assert [reason is None for reason in outcome.reasons] == [True, False]


@pytest.mark.parametrize("stages", ["[[NaN, 5]]", "[[2.0, Infinity]]", "[[2.0]]", "5"])
def test_stages_that_are_no_load_are_a_reason(stages):
    with pytest.raises(InexpressibleError, match="stages are no pairs of rate and seconds"):
        question_of(row(stages=stages))


def test_answers_of_one_token_have_no_time_per_token(tmp_path):
    found = compare(write(tmp_path / "t.parquet", [row(output_len=1)]))
    assert found["expressible"] == 1
    assert "tpot_derived_ms" not in found["metrics"]
    assert "e2e_mean_ms" in found["metrics"]


def test_a_quantised_checkpoint_keeps_its_weights_under_16_bit_activations():
    assert dict(question_of(row(model="Qwen/Qwen3-14B-AWQ")).formats)["weight_only"] is True
    assert question_of(row(model="Qwen/Qwen3-14B")).formats == ()
    assert dict(question_of(row(precision="FP8")).formats) == {"linear_dtype": "fp8", "expert_dtype": "fp8"}
