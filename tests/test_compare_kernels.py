"""Tables of single kernels, layers and exchanges: predictions are the cost model's, by hand where that is short."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perfsim.calibrate.routing import largest_share
from perfsim.cost.roofline import op_estimate
from perfsim.cost.speed_of_light import collective_seconds
from perfsim.ops.gemm import gemm as lower_gemm
from perfsim.ops.step import Span, attended_pairs, attention_spans, context_read
from perfsim.ops.transformer import lower
from perfsim.spec import catalog
from perfsim.spec.load import find_calibration
from perfsim.spec.model import GroupedQueryAttention
from validation.collectives.predict import network
from validation.collectives.rows import expert_rows, expert_times
from validation.compare import lowered, streams
from validation.compare.cli import compare
from validation.compare.exchanges import deepep_seconds
from validation.ops.predict import benchmark_seconds

MEASURED = Path(__file__).resolve().parents[1] / "validation" / "measured"


def write(path, rows: list[dict[str, object]]):
    pq.write_table(pa.table({name: pa.array([row[name] for row in rows]) for name in rows[0]}), path)
    return path


def predicted_us(path, row: dict[str, object], column: str = "latency_us") -> float:
    """What is predicted for one row."""
    return row[column] * (1 + compare(write(path / "one.parquet", [row]))["metrics"][column]["bias"])


def gemm(**changes: object) -> dict[str, object]:
    return {"system": "h100_sxm", "framework": "vllm", "version": "1", "gemm_dtype": "bfloat16", "m": 64, "n": 6144,
            "k": 4096, "latency_us": 20.0, **changes}  # fmt: skip


def test_products(tmp_path):
    rows = [gemm(), gemm(m=131072, n=65536, k=65536, latency_us=1e6), gemm(system="b60"), gemm(gemm_dtype="fp3"),
            gemm(latency_us=None), gemm(gemm_dtype="fp8")]  # fmt: skip
    found = compare(write(tmp_path / "t.parquet", rows))
    assert found["expressible"] == 3
    assert found["not_expressible"] == {
        "no descriptor of device 'b60'": 1, "no measured value": 1, "number format 'fp3' not modelled": 1,
    }  # fmt: skip
    assert found["groups"]["gemm_dtype"]["fp8"]["latency_us"]["n"] == 1


@pytest.mark.parametrize(
    ("m", "n", "k", "dtype", "most"),
    [(131072, 65536, 65536, "bfloat16", 1.5), (8192, 8192, 8192, "bfloat16", 1.5), (8192, 8192, 8192, "fp8", 2.3)],
)
def test_large_products_run_near_the_peak_of_their_format(tmp_path, m, n, k, dtype, most):
    """2 m n k over 989.5 TFLOP/s of an H100, twice that in 8 bits; the first overflows 32 bits."""
    light = 1e6 * 2 * m * n * k / (989.5e12 * (2 if dtype == "fp8" else 1))
    assert light <= predicted_us(tmp_path, gemm(m=m, n=n, k=k, gemm_dtype=dtype)) <= most * light


def test_attention_is_that_of_a_whole_model(tmp_path):
    """A kernel that was not timed for its engine takes what it takes inside a step of Llama-3.1-8B."""
    model, count = catalog.model("llama-3.1-8b-instruct"), 32
    base = {"system": "h100_sxm", "framework": "sglang", "version": "1", "attn_dtype": "bfloat16",
            "kv_cache_dtype": "bfloat16", "head_dim": 128, "window_size": 0, "num_heads": 32,
            "num_key_value_heads": 8}  # fmt: skip
    device = find_calibration(accelerator="h100-80gb-sxm", engine="sglang")
    chip = catalog.accelerator("h100-80gb-sxm")
    for kind, row in (
        ("decode_attention", {"isl": 1, "batch_size": 16, "step": 2047}),
        ("prefill_attention", {"isl": 3000, "batch_size": 2, "step": 0}),
    ):
        one = np.ones(1)
        if kind == "decode_attention":
            step = lowered.decodes(model, sequences=16 * one, context=2048 * one)
        else:
            step = lowered.prefills(model, sequences=2 * one, new=3000 * one, past=0 * one)
        ops = [op for op in lower(model, step, tp=1) if getattr(op, "kind", "") == kind]
        micro = 1e6 * float(op_estimate(ops[0], chip, device.device, device.power).seconds[0]) / count
        found = compare(write(tmp_path / f"{kind}.parquet", [{**base, **row, "latency_us": micro}]))
        assert found["metrics"]["latency_us"]["mape_mean"] < 1e-9


@pytest.mark.parametrize(("size", "stays"), [(16, True), (65536, False)])
def test_what_a_benchmark_keeps_in_the_cache_is_credited_to_its_own_kernels(tmp_path, size, stays):
    """Repeated on the same buffers, a kernel is faster than in an engine where they fit into the L2 cache, only."""
    row = gemm(m=16, n=size * 64, k=2048, latency_us=100.0)
    timed = compare(write(tmp_path / "t.parquet", [row]))["metrics"]["latency_us"]["bias"]
    rows = {"m": np.array([16.0]), "n": np.array([size * 64.0]), "k": np.array([2048.0])}
    said = benchmark_seconds("gemm", "bf16", rows, device="h100-80gb-sxm", backend="vllm")
    assert said is not None
    assert timed == pytest.approx(said[0] / 100e-6 - 1.0)
    model = lowered.one_layer()
    work = lower_gemm(model, "gemm", 1, 16.0, size * 64.0, 2048.0, weight_dtype="bf16")
    served = float(lowered.seconds([work], accelerator="h100-80gb-sxm"))
    assert (said[0] < 0.99 * served) == stays
    assert said[0] <= served * (1 + 1e-9)


@pytest.mark.parametrize("window", [300, None])
def test_sums_over_the_batch_agree_with_those_of_single_chunks(window):
    attention = GroupedQueryAttention(num_attention_heads=8, num_key_value_heads=8, head_dim=64, window=window)
    model = lowered.one_layer(attention=attention)
    spans = attention_spans(model)
    assert (Span("window", 300) in spans) == (window is not None)
    new, past = np.array([10.0, 500.0, 200.0]), np.array([0.0, 100.0, 250.0])
    step = lowered.prefills(model, sequences=np.full(3, 2.0), new=new, past=past)
    for place, span in enumerate(spans):
        for index, (chunk, before) in enumerate(zip(new.astype(int), past.astype(int), strict=True)):
            assert step.prefill_pairs[place][index] == 2 * attended_pairs(int(chunk), int(before), span)
            assert step.prefill_context[place][index] == 2 * context_read(int(chunk), int(before), span)


def expert(**changes: object) -> dict[str, object]:
    return {"system": "h100_sxm", "framework": "vllm", "version": "1", "moe_dtype": "bfloat16",
            "kernel_source": "vllm_fused_moe", "distribution": "balanced", "hidden_size": 2048, "inter_size": 768,
            "topk": 8, "num_experts": 128, "moe_tp_size": 1, "moe_ep_size": 1, "num_tokens": 4,
            "latency_us": 200.0, **changes}  # fmt: skip


def test_experts(tmp_path):
    rows = [expert(), expert(moe_tp_size=5), expert(moe_dtype="w9")]
    found = compare(write(tmp_path / "t.parquet", rows))
    assert found["not_expressible"] == {
        "experts that do not divide among the GPUs": 1, "number format 'w9' not modelled": 1,
    }  # fmt: skip

    def micro(**changes: object) -> float:
        return predicted_us(tmp_path, expert(**changes))

    assert micro(distribution="power_law_1.2") < micro()  # fewer experts are touched
    # 4 tokens pick 8 of 128 experts each: 128 (1 - (120/128)^4) = 29.1 are read, three matrices of 2048 x 768 each.
    read = 1e6 * 29.1 * 3 * 2048 * 768 * 2 / 3.35e12
    assert read < micro() < 2.2 * read
    assert read * 2 / 3 < micro(kernel_source="x_nongated") < 0.9 * micro()
    assert read / 8 < micro(moe_ep_size=8) < micro() / 2
    computed = 1e6 * 16384 * 8 * 3 * 2 * 2048 * 768 / 989.5e12
    assert computed < micro(num_tokens=16384) < 3 * computed


def test_latent_attention_and_quantisation(tmp_path):
    base = {"system": "h200_sxm", "framework": "trtllm", "version": "1", "model": None, "gemm_type": None,
            "mla_dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "num_heads": 16, "batch_size": 8, "isl": 1,
            "step": 4095, "latency_us": 60.0}  # fmt: skip
    module = {"phase": "decode_module", "model": "deepseek-ai/DeepSeek-V3", "gemm_type": "fp8_block"}
    rows = [{**base, "phase": "decode"}, {**base, **module},
            {**base, "phase": "prefill", "isl": 2048, "step": 0, "kv_cache_dtype": "int7"}]  # fmt: skip
    found = compare(write(tmp_path / "mla.parquet", rows))
    assert found["not_expressible"] == {"a cache in int7 is not modelled": 1}
    phases = found["groups"]["phase"]
    # The block also reads 36.6 MB of 8-bit projections: q 7168 x 1536 and 1536 x 16 x 192, kv 7168 x 576 and
    # 512 x 16 x 256, o 16 x 128 x 7168.
    longer = 60 * (phases["decode_module"]["latency_us"]["bias"] - phases["decode"]["latency_us"]["bias"])
    assert 36.6e6 / 4.8e6 < longer < 60
    # 128 heads attend to 64 x 8192 entries: products with 576 and 512 columns of each.
    computed = 1e6 * 64 * 8192 * 128 * 2 * (576 + 512) / 989.5e12
    many = {**base, "phase": "decode", "batch_size": 64, "num_heads": 128, "step": 8191}
    assert computed < predicted_us(tmp_path, many) < 2.5 * computed
    columns = {"heads": 128, "tiles": 1, "dim": 544, "window": 0, "new": 1, "sequences": 64, "context": 8192,
               "entry": 576, "query": 128 * 1088, "pair": 2 * 128 * 1088}  # fmt: skip
    own = benchmark_seconds("decode", "mla-bf16", {name: np.array([float(value)]) for name, value in columns.items()},
                            device="h200-141gb-sxm", backend="trtllm")  # fmt: skip
    assert own is not None
    assert predicted_us(tmp_path, many) == pytest.approx(1e6 * own[0])


def test_quantisation_reads_16_bits_and_writes_8(tmp_path):
    row = {"system": "h100_sxm", "framework": "vllm", "version": "1", "op": "scale_matrix", "quant_dtype": "fp8",
           "m": 32768, "k": 8192, "latency_us": 300.0}  # fmt: skip
    moved = 1e6 * 32768 * 8192 * 3 / 3.35e12
    assert moved < predicted_us(tmp_path, row) < 1.3 * moved
    rows = [{**row, "op": "computescale"}]
    assert compare(write(tmp_path / "quantise.parquet", rows))["not_expressible"] == {
        "a difference of two kernels, faster than HBM delivers": 1
    }


def test_layers_and_mixed_batches(tmp_path):
    base = {"hardware": "RTXPRO6000", "model": "meta-llama/Llama-3.1-8B", "tp": 1, "size_meaning": "tokens",
            "activated_experts": None, "time_us": 100.0}  # fmt: skip
    rows = [{**base, "op": op, "size": 512} for op in ("qkv_proj", "layernorm", "down_proj", "magic", "moe")]
    found = compare(write(tmp_path / "layers.parquet", rows))
    assert found["not_expressible"] == {
        "operator 'magic' is not modelled on its own": 1, "operator 'moe' is not part of this model": 1,
    }  # fmt: skip
    # Llama-3.1-8B: q of 32 heads, k and v of 8, of 128 each, from 4096; down from 14336.
    model, chip = lowered.one_layer(), "rtx-pro-6000-blackwell-96gb"
    for op, columns, depth in (("qkv_proj", (32 + 2 * 8) * 128, 4096), ("down_proj", 4096, 14336)):
        work = lower_gemm(model, op, 1, 512.0, columns, depth, weight_dtype="bf16")
        own = 1e6 * float(lowered.seconds([work], accelerator=chip, version="0.19.0"))  # that of the table
        assert predicted_us(tmp_path, {**base, "op": op, "size": 512}, "time_us") == pytest.approx(own)


def test_mixed_batches_cost_their_decodes_and_their_chunk(tmp_path):
    mixed = {"hardware": "RTXPRO6000", "model": "meta-llama/Llama-3.1-8B", "tp": 1, "prefill_chunk": 256,
             "kv_prefill": 1024, "n_decode": 32, "kv_decode": 2048, "time_us": 400.0}  # fmt: skip
    alone = {**mixed, "prefill_chunk": 0}
    # 32 decodes read 2048 entries of 8 heads; 256 tokens after 1024 attend to 256 x 1024 + 256 x 257 / 2 pairs.
    read = 1e6 * 32 * 2048 * 8 * 128 * 2 * 2 / 1.792e12
    computed = 1e6 * 4 * 32 * 128 * (256 * 1024 + 256 * 257 / 2) / 503.8e12
    decodes = predicted_us(tmp_path, alone, "time_us")
    assert read < decodes < 1.8 * read
    assert decodes + computed < predicted_us(tmp_path, mixed, "time_us") < 3.5 * (read + computed)


def test_linear_operators_are_sharded_over_the_gpus(tmp_path):
    """Products of 1024 tokens and 4096 numbers on one of two A100s: q, k and v of 16 heads, gate and up of 5504."""
    linear = {"gpu": "a100", "model": "any", "tp": 2, "n_head": 32, "n_kv_head": 32, "n_embd": 4096,
              "n_expanded_embd": 11008, "vocab_size": 32000, "gated": True, "num_tokens": 1024,
              "min_us": 1.0}  # fmt: skip
    for op, columns in (("attn_pre_proj", 3 * 16 * 128), ("mlp_up_proj", 2 * 5504)):
        light = 1e6 * 2 * 1024 * 4096 * columns / 312e12
        assert light < predicted_us(tmp_path, {**linear, "op": op, "median_us": 100.0}, "median_us") < 1.5 * light


def test_elementwise_layers_are_priced_as_their_benchmark_ran_them(tmp_path):
    """A launch and the bytes, of which the L2 cache serves some: the logits of 208 sequences in fp32, and a norm that
    reads and writes the hidden state and its residual in 16 bits."""
    base = {"hardware": "RTXPRO6000", "model": "Qwen/Qwen3-32B", "tp": 1, "activated_experts": None}
    rows = [{**base, "op": "sampler", "size": 208, "size_meaning": "sequences", "time_us": 153.0},
            {**base, "op": "layernorm", "size": 1936, "size_meaning": "tokens", "time_us": 18.7}]  # fmt: skip
    known = streams.conditions().backends["vllm"]["rtx-pro-6000-blackwell-96gb"]
    kinds = (("sampler", 208 * 151936 * 4), ("norm", 1936 * 4 * 5120 * 2))
    for row, (family, moved) in zip(rows, kinds, strict=True):
        fitted = known[family]
        gain, held = fitted.conditions["gain"], fitted.conditions["share"] * 128 * 2**20
        served = gain / (1 + gain) / (1 + (moved / held) ** 4)
        own = 1e6 * (fitted.curve.launch + moved / (fitted.curve.bandwidth * 1.792e12) * (1 - served))
        assert predicted_us(tmp_path, row, "time_us") == pytest.approx(own)
        assert own == pytest.approx(row["time_us"], rel=0.25)  # as measured, with other shapes in the fit
    # Nobody timed an H200's: its norms are priced as the cost model prices any.
    guess = 1e6 * (2.5e-6 + 1936 * 4 * 5120 * 2 / (0.8 * 4.8e12))
    assert predicted_us(tmp_path, {**rows[1], "hardware": "H200"}, "time_us") == pytest.approx(guess, rel=0.25)


@pytest.mark.parametrize("name", ["collectives"])
def test_committed_slice_of_collectives(tmp_path, name):
    """The slice in the repository, which leaves columns out that are the same throughout."""
    with (MEASURED / f"{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[::7]
    typed = [{**row, "library": "", "num_nodes": int(row["num_nodes"]), "num_gpus": int(row["num_gpus"]),
              "bytes": int(row["bytes"]), "latency_us": float(row["latency_us"])} for row in rows]  # fmt: skip
    found = compare(write(tmp_path / "t.parquet", typed))
    assert found["rows"] == len(rows)
    assert found["expressible"] == len(rows)
    assert found["metrics"]["latency_us"]["n"] == len(rows)
    assert found["metrics"]["latency_us"]["mape_median"] < 0.10  # 5 to 7% in the report
    unknown = compare(write(tmp_path / "u.parquet", [{**typed[0], "system": "abacus"}]))
    assert unknown["not_expressible"] == {"no machine stands for 'abacus'": 1}


def test_deepep_on_fewer_sms_takes_longer_and_never_beats_its_links(tmp_path):
    base = {"system": "h100_sxm", "framework": "sglang", "version": "1", "mode": "normal", "node_num": 1,
            "hidden_size": 7168, "num_token": 4096, "num_topk": 8, "num_experts": 256, "dispatch_avg_t_us": None,
            "combine_avg_t_us": None}  # fmt: skip
    rows = [{**base, "dispatch_sms": sms, "combine_sms": sms, "dispatch_transmit_us": took,
             "combine_transmit_us": 2 * took} for sms, took in ((4.0, 2068.0), (20.0, 491.0))]  # fmt: skip
    found = compare(write(tmp_path / "t.parquet", rows))
    assert found["expressible"] == 2
    assert found["metrics"]["dispatch_transmit_us"]["mape_mean"] < 0.2
    assert found["metrics"]["combine_transmit_us"]["mape_mean"] < 0.2
    one = next(expert_rows(expert_times(rows[1:])))
    few, many = deepep_seconds(one, 4.0), deepep_seconds(one, 20.0)
    assert few > 3 * many
    assert many == deepep_seconds(one)
    assert many > collective_seconds(one.work, network("dgx-h100", 1))


@pytest.mark.parametrize(("experts", "ranks"), [(256, 8), (128, 16), (8, 2)])
def test_the_busiest_rank_gets_more_of_a_skewed_routing(experts, ranks):
    shares = [largest_share(experts, ranks, 1.2, tokens) for tokens in (1.0, 64.0, 4096.0, 10.0**6)]
    assert shares[0] == pytest.approx(1 / ranks, rel=0.01)
    assert shares == sorted(shares)
    assert shares[-1] <= 1.0
    assert largest_share(experts, ranks, 0.0, 4096.0) == 1 / ranks
