"""Tables of serving runs that were made up: requests of runs, closed loops, what is missing."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from validation.compare import facts
from validation.compare.cli import compare
from validation.compare.runs import STATISTICS


def write(path, rows: list[dict[str, object]]):
    pq.write_table(pa.table({name: pa.array([row[name] for row in rows]) for name in rows[0]}), path)
    return path


def requests(count: int, **changes: object) -> list[dict[str, object]]:
    rng = np.random.default_rng(1)
    arrivals = np.cumsum(rng.exponential(0.1, count))
    fixed = {
        "hardware": "RTXPRO6000", "model": "meta-llama/Llama-3.1-8B", "vllm_version": "0.19.0", "tp": 1, "dp": 1,
        "ep": False, "max_num_seqs": 128, "max_num_batched_tokens": 2048, "num_kv_tokens": 41_600.0,
        "prefix_caching": True, **changes,
    }  # fmt: skip
    return [
        {
            **fixed,
            **{"request_index": index, "arrival_s": float(arrivals[index]), "prompt_tokens": 100 + index},
            **{"output_tokens": 40, "hash_block_ids": list(range((100 + index) // 16))},
            **{"ttft_s": 0.05, "tpot_s": 0.013, "e2e_s": 0.05 + 39 * 0.013},
        }
        for index in range(count)
    ]


def test_statistics_of_single_requests(tmp_path):
    rows = requests(40) + requests(30, vllm_version=None) + requests(20, hardware="RTX4090")
    found = compare(write(tmp_path / "requests.parquet", rows))
    assert (found["rows"], found["expressible"]) == (90, 60)
    assert found["not_expressible"] == {"engine version not published": 30}
    assert set(found["metrics"]) == {f"{name}_s:{stat}" for name in ("ttft", "tpot", "e2e") for stat in STATISTICS}
    assert found["metrics"]["tpot_s:mean"]["n"] == 2  # runs, not requests
    for hardware, bandwidth in (("RTXPRO6000", 1.792e12), ("RTX4090", 1.008e12)):
        light = 2 * (8.03e9 - 128_256 * 4096) / bandwidth  # every weight but the embedding is read in each step
        assert light < 0.013 * (1 + found["groups"]["hardware"][hardware]["tpot_s:mean"]["bias"]) < 1.6 * light
    assert set(found["groups"]) == {"hardware", "model", "vllm_version", "tp", "dp", "ep", "max_num_seqs",
                                    "max_num_batched_tokens", "num_kv_tokens", "prefix_caching", "output_tokens",
                                    "ttft_s", "tpot_s", "e2e_s"}  # fmt: skip


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        ("tp", "plan not published"), ("dp", "plan not published"),
        ("max_num_seqs", "no value of max_num_seqs published"),
        ("arrival_s", "load not published: when requests were sent"),
        ("output_tokens", "load not published: lengths of requests"),
    ],
)  # fmt: skip
def test_requests_of_a_run_without_a_fact_have_its_reason(tmp_path, column, reason):
    rows = [{**row, column: None} for row in requests(3)] + requests(4, vllm_version="0.19.1")
    found = compare(write(tmp_path / "requests.parquet", rows), bands=False)
    assert found["not_expressible"] == {reason: 3}


def test_state_by_second_needs_the_load_beside_it(tmp_path):
    series = [{"hardware": "RTXPRO6000", "model": "meta-llama/Llama-3.1-8B", "t": float(second),
               "prompt_throughput": 0.0, "gen_throughput": 300.0, "running": 4, "waiting": 0, "kv_cache_pct": 2.0}
              for second in range(1, 12)]  # fmt: skip
    path = write(tmp_path / "series.parquet", series)
    assert compare(path)["not_expressible"] == {"load not published: no table of requests beside this one": 11}
    write(tmp_path / "other.parquet", requests(40))
    found = compare(path)
    assert found["expressible"] == 11
    assert found["metrics"]["running"]["n"] == 11
    assert "waiting" not in found["metrics"]  # nothing waited, and there is no relative error of nothing
    # All 40 requests are over by then: their tokens, 40 each, are those of all seconds together.
    assert 11 * 300 * (1 + found["metrics"]["gen_throughput"]["bias"]) == pytest.approx(40 * 40)


def sample(**changes: object) -> dict[str, object]:
    return {
        "backend": "vllm", "backend_version": "0.12.0", "model_path": "Qwen/Qwen3-32B", "system": "h100_sxm",
        "precision": "fp8", "mode": "agg", "isl": 1024, "osl": 64, "gemm_quant_mode": "fp8", "moe_quant_mode": "fp8",
        "tp_size": 2.0, "pp_size": 1.0, "attention_dp_size": None, "moe_tp_size": 1.0, "moe_ep_size": 1.0,
        "prefill_tp_size": None, "prefill_num_workers": None, "decode_tp_size": None, "decode_num_workers": None,
        "prefill_pp_size": 1.0, "decode_pp_size": 1.0, "measured": None,
        "concurrency": 8.0, "silicon_ttft_ms": 100.0, "silicon_tpot_ms": 13.0, "origin": "nvidia_gap_analysis",
        "exact_duplicate": False, "same_config_tpot_spread": 1.0, **changes,
    }  # fmt: skip


def test_closed_loops_and_their_reasons(tmp_path):
    rows = [
        sample(), sample(), sample(exact_duplicate=True), sample(same_config_tpot_spread=2.5), sample(concurrency=None),
        sample(model_path="nobody/Nothing"), sample(backend="atom"), sample(backend_version=None),
        sample(gemm_quant_mode="fp3"), sample(tp_size=None), sample(pp_size=2.0),
        sample(mode="disagg", tp_size=None, prefill_tp_size=1.0, decode_tp_size=2.0),
        sample(mode="disagg", prefill_tp_size=1.0, decode_tp_size=2.0, prefill_num_workers=2.0,
               decode_num_workers=1.0),
    ]  # fmt: skip
    found = compare(write(tmp_path / "sample.parquet", rows))
    assert found["expressible"] == 4
    assert found["not_expressible"] == {
        "a setting was not published: equal configurations differ by more than a factor of 2": 1,
        "engine version not published": 1, "exact duplicate of another row": 1,
        "load not published: no concurrency": 1, "no descriptor of model 'nobody/Nothing'": 1,
        "no profile of engine 'atom'": 1,
        "plan not published": 1, "plan not published: number of workers": 1, "weight format 'fp3' not known": 1,
    }  # fmt: skip
    assert found["metrics"]["silicon_tpot_ms"]["n"] == 4
    # Of 32.8e9 weights each of two GPUs reads half, in 8 bits; prompts of new requests come on top.
    light = 1e3 * 32e9 / 2 / 3.35e12
    assert light < 13.0 * (1 + found["groups"]["mode"]["agg"]["silicon_tpot_ms"]["bias"]) < 3 * light


def test_plans_of_a_sweep_that_recorded_none_are_not_believed():
    sweep = {"mode": "disagg", "system": "gb200", "measured": "2025-12-21"}
    facts.check_plan(sample(**sweep), engine="vllm")
    facts.check_plan(sample(**{**sweep, "measured": "2026-02-08"}), engine="sglang")
    with pytest.raises(facts.InexpressibleError, match="placeholders"):
        facts.check_plan(sample(**sweep), engine="sglang")


def point(**changes: object) -> dict[str, object]:
    return {
        "hardware": "h200", "framework": "trt", "model": "dsr1", "precision": "fp8", "spec_method": "none",
        "disagg": False, "prefill_tp": 8, "prefill_ep": 1, "prefill_dp_attention": False, "prefill_num_workers": 0,
        "decode_tp": 8, "decode_ep": 1, "decode_dp_attention": False, "decode_num_workers": 0, "isl": 1024, "osl": 128,
        "conc": 4, "image": "nvcr.io/nvidia/tensorrt-llm/release:1.1.0rc2.post2", "median_ttft": 0.2,
        "median_tpot": 0.011, "p99_e2el": 2.0, "output_tput_per_gpu": 40.0, **changes,
    }  # fmt: skip


def test_inferencex_in_seconds_and_per_gpu(tmp_path):
    rows = [point(), point(spec_method="mtp"), point(decode_ep=4), point(decode_dp_attention=True, decode_ep=8)]
    found = compare(write(tmp_path / "points.parquet", rows))
    assert found["not_expressible"] == {
        "acceptance of drafts not published": 1,
        "plan not published: attention and experts are on different numbers of GPUs": 1,
    }  # fmt: skip
    assert set(found["metrics"]) == {"median_ttft", "median_tpot", "p99_e2el", "output_tput_per_gpu"}
    assert found["metrics"]["median_tpot"]["n"] == 2
    # Four clients get a token each in the time per token, unless they wait for the first one of their next request.
    alone = compare(write(tmp_path / "point.parquet", [point()]), bands=False)["metrics"]
    per_token, tokens = 0.011 * (1 + alone["median_tpot"]["bias"]), 8 * 40 * (1 + alone["output_tput_per_gpu"]["bias"])
    assert 0.7 * 4 / per_token < tokens < 1.05 * 4 / per_token


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        (("params_b", "gpus", "global_batch", "micro_batch", "hidden", "heads", "layers", "iter_ms"),
         "training is not simulated yet"),
        (("model", "hardware", "prompt_size", "batch_size", "token_size", "prompt_ms", "token_ms", "tensor_parallel"),
         "engine and version not published"),
    ],
)  # fmt: skip
def test_tables_that_say_too_little(tmp_path, columns, reason):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({name: pa.array([1.0, 2.0]) for name in columns}), path)
    found = compare(path)
    assert found["not_expressible"] == {reason: 2}
    assert found["metrics"] == {}


def test_runs_of_a_study_may_lie_in_several_tables_beside_it(tmp_path):
    state = {"model": "meta-llama/Llama-3.1-8B", "prompt_throughput": 0.0, "gen_throughput": 300.0, "running": 4,
             "waiting": 0, "kv_cache_pct": 2.0}  # fmt: skip
    series = [{"hardware": hardware, "t": float(second), **state}
              for hardware in ("RTXPRO6000", "RTX4090") for second in range(1, 6)]  # fmt: skip
    path = write(tmp_path / "series.parquet", series)
    write(tmp_path / "a.parquet", requests(40, hardware="RTX4090"))
    assert compare(path)["not_expressible"] == {"load of this run not published": 5}
    write(tmp_path / "b.parquet", requests(40))
    assert compare(path)["expressible"] == 10
