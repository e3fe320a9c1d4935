"""Command lines of vLLM, SGLang and TensorRT-LLM: read as the engines read them, and nothing is dropped silently."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfsim.cli.main import main
from perfsim.errors import InputError
from perfsim.serving.replica import plan_replica
from perfsim.spec.command_line import CommandReport, read_command
from perfsim.spec.command_line.parse import parse
from perfsim.spec.command_line.shell import split_commands
from perfsim.spec.command_line.table import ENGINES, classes, load_table
from perfsim.spec.load import load_scenario
from perfsim.spec.scenario import Scenario
from perfsim.spec.yaml import load_yaml
from perfsim.units import GB, GIB

PARSES = json.loads((Path(__file__).parent / "data" / "vllm_parses.json").read_text())
LLAMA = "meta-llama/Llama-3.1-8B"


def scenario(engine: str, text: str, **options: Any) -> tuple[Scenario, CommandReport]:
    """The scenario of a command line on a node of H100s, unless said otherwise, and its report."""
    command = read_command(engine, text)
    found = load_scenario(command=command, **{"hardware": "dgx-h100", **options})
    assert command.report is not None
    return found, command.report


def refusal(engine: str, text: str, **options: Any) -> str:
    """The one line that a command line is refused with."""
    with pytest.raises(InputError) as caught:
        scenario(engine, text, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_flag_is_in_exactly_one_class(engine: str) -> None:
    named = Counter(name for name, _ in classes(engine))
    table = load_table(engine)
    assert {name: times for name, times in named.items() if times > 1} == {}
    assert set(named) == {flag.name for flag in table.flags}
    assert len({name for flag in table.flags for name in flag.names}) == sum(len(flag.names) for flag in table.flags)


def test_tables_are_whole() -> None:
    """As many flags as the parsers of vLLM 0.32.0 and SGLang 0.5.23 have, old ones aside."""
    counts = {engine: sum(not flag.former for flag in load_table(engine).flags) for engine in ("vllm", "sglang")}
    assert counts == {"vllm": 316, "sglang": 531}


@pytest.mark.parametrize("row", PARSES["rows"], ids=lambda row: row["line"])
def test_parsed_as_vllm_itself_parses(row: dict[str, Any]) -> None:
    """The oracle is vLLM's parser, which was run on these lines."""
    table = load_table("vllm")
    try:
        parsed = parse(shlex.split(row["line"]), table)
    except InputError:
        assert not row["accepted"]
        return
    assert row["accepted"]
    assert parsed.model == "m"
    values = {each.flag.name.replace("-", "_"): each.value for each in parsed.given}
    assert {key: value for key, value in values.items() if key in row["values"]} == row["values"]


def test_a_recipe_becomes_a_scenario() -> None:
    text = (
        "vllm serve meta-llama/Llama-3.1-70B --tensor-parallel-size 8 --max-num-seqs 256 --max-model-len 32k --port 80"
    )
    found, report = scenario("vllm", text)
    assert found.model.name == "meta-llama--Meta-Llama-3.1-70B"
    assert (found.parallel.tp, found.policy.max_num_seqs, found.policy.max_model_len) == (8, 256, 32000)
    assert found.calibration.engine.name == "vllm"
    assert report.ignored == ("--port",)
    assert report.modelled["--tensor-parallel-size"] == ["parallel.tp=8"]
    assert report.warnings == ()


@pytest.mark.parametrize(
    "text",
    [
        f"serve {LLAMA} --max-num-seqs 64",
        f"vllm serve {LLAMA} --max-num-seqs 64",
        f"/opt/venv/bin/vllm serve --max-num-seqs 64 {LLAMA}",
        f"{LLAMA} --max-num-seqs=64",
        f"--model {LLAMA} --max_num_seqs 64",
        f"python3 -m vllm.entrypoints.openai.api_server --model={LLAMA} --max-num-seqs 64",
        f"nohup vllm serve '{LLAMA}' --max-num-seqs \"64\" > server.log 2>&1 &",
        f"#!/bin/sh\n# it\nset -e\nMODEL={LLAMA}\nSEQS=64\nvllm serve ${{MODEL}} \\\n  --max-num-seqs $SEQS  # few\n",
        f"bash -lc 'vllm serve {LLAMA} --max-num-seqs 64'",
        f"docker run --gpus all -v ~/a:/root vllm/vllm-openai:v0.32.0 --model {LLAMA} --max-num-seqs 64",
    ],
)
def test_forms_in_which_people_paste_it(text: str) -> None:
    found, _ = scenario("vllm", text)
    assert (found.model.name, found.policy.max_num_seqs) == ("meta-llama--Meta-Llama-3.1-8B", 64)


def test_a_file_and_a_config_file(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"model: {LLAMA}\ntensor-parallel-size: 2\nmax-num-seqs: 8\ndisable-cascade-attn: true\n")
    script = tmp_path / "serve.sh"
    script.write_text(f"vllm serve --config {config} --max-num-seqs 16\n")
    found, report = scenario("vllm", f"@{script}")
    assert (found.parallel.tp, found.policy.max_num_seqs) == (2, 16)
    assert any("--disable-cascade-attn" in warning for warning in report.warnings)
    assert "none.sh" in refusal("vllm", f"@{tmp_path / 'none.sh'}")
    assert "none.yaml" in refusal("vllm", f"serve x --config {tmp_path / 'none.yaml'}")


def test_what_is_not_modelled_is_named() -> None:
    text = (
        "HF_TOKEN=secret VLLM_USE_V1=1 numactl vllm serve {} --disable-cascade-attn --cpu-offload-gb 4 --swap-space 4"
    )
    _, report = scenario("vllm", text.format(LLAMA))
    told = "\n".join(report.warnings)
    for name in ("--disable-cascade-attn", "--cpu-offload-gb", "--swap-space", "VLLM_USE_V1", "numactl"):
        assert name in told
    assert "HF_TOKEN" in report.ignored
    assert "secret" not in told + str(report)
    _, report = scenario("vllm", f"serve {LLAMA} --cpu-offload-gb 0")
    assert (report.warnings, report.ignored) == ((), ("--cpu-offload-gb",))  # its default


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("serve x --max-num-sqes 4", "did you mean '--max-num-seqs'"),
        ("serve x --max-num-seqs four", "expected an integer, got 'four'"),
        ("serve x --max-num-seqs", "--max-num-seqs"),
        ("serve x --max-num 4", "could match"),
        ("serve x --scheduling-policy fifo", "did you mean 'fcfs'"),
        ("serve x --speculative-config '{\"method\"'", "expected JSON"),
        ("serve x --speculative-config '{\"a\": NaN}'", "expected JSON"),
        ("serve 'x", "unbalanced quote"),
        ('serve x --api-key "y', "unbalanced quote"),
        ("serve x y", "expected one model"),
        ("", "no command that starts it"),
        ("ls; pwd", "no command that starts it"),
        ("vllm serve x\nvllm serve y", "2 commands"),
        (f"serve {LLAMA} --max-num-seqs -4", "greater than 0"),
        (f"serve {LLAMA} --gpu-memory-utilization 1.5", "of at most 1"),
        (f"serve {LLAMA} --data-parallel-size 0", "at least 1"),
        ("serve $MODEL", "--model names what stands in for it"),
        (f"serve {LLAMA} --speculative-config [1]", "expected a JSON object"),
        (f"serve {LLAMA} --speculative-config '{{\"method\": \"eagle3\"}}'", "num_speculative_tokens is missing"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(text: str, expected: str) -> None:
    message = refusal("vllm", text)
    assert message.startswith("--vllm")
    assert expected in message


def test_what_vllm_would_refuse_to_start_with_is_refused() -> None:
    assert "expected at most 131072" in refusal("vllm", f"serve {LLAMA} --max-model-len 1M")


def test_other_flags_win_and_the_scenario_files_policy_does_not(tmp_path: Path) -> None:
    file = tmp_path / "scenario.yaml"
    content = load_yaml(Path(__file__).parents[1] / "workloads" / "scenarios" / "default.yaml")
    file.write_text(json.dumps({**content, "parallel": {"tp": 4}, "policy": {"max_num_seqs": 7, "block_size": 32}}))
    command = read_command("vllm", f"serve {LLAMA} --max-num-batched-tokens 4096 --max-num-seqs 64")
    plain = load_scenario(file, command=command, hardware="dgx-h100")
    assert (plain.parallel.tp, plain.policy.max_num_seqs, plain.policy.block_size) == (1, 64, 16)
    won = load_scenario(
        file, command=command, hardware="dgx-h100", tp=2, model="llama-2-7b-hf", overrides=["policy.max_num_seqs=32"]
    )
    assert (won.parallel.tp, won.policy.max_num_seqs, won.policy.max_num_batched_tokens) == (2, 32, 4096)
    assert won.model.name == "llama-2-7b-hf"
    assert load_scenario(command=command, hardware="h100", rate=3).workload.arrivals.rate == 3


def test_data_parallel_ranks_are_in_lock_step_only_with_experts() -> None:
    dense, _ = scenario("vllm", f"serve {LLAMA} --data-parallel-size 4")
    assert (dense.parallel.dp, dense.deployment.groups[0].count, dense.deployment.router.kind) == (1, 4, "least_loaded")
    mixture, _ = scenario("vllm", "serve Qwen/Qwen3-30B-A3B -tp 2 -dp 4 --enable-expert-parallel")
    assert (mixture.parallel.tp, mixture.parallel.dp, mixture.parallel.ep) == (2, 4, 8)
    assert mixture.deployment.groups[0].count == 1
    fewer, _ = scenario("vllm", "serve Qwen/Qwen3-30B-A3B -tp 2 -dp 4 -ep", overrides=["parallel.tp=1"])
    assert fewer.parallel.ep == 4
    _, report = scenario("vllm", f"serve {LLAMA} -ep")
    assert "no experts" in report.warnings[0]


def test_the_acceptance_of_drafts_is_asked_for() -> None:
    text = "serve deepseek-ai/DeepSeek-V3 -tp 8 --speculative-config.method deepseek_mtp"
    assert "--set policy.speculative.acceptance" in refusal("vllm", text, hardware="dgx-h200")
    found, _ = scenario("vllm", text, hardware="dgx-h200", overrides=["policy.speculative.acceptance=0.8"])
    assert found.policy.speculative is not None
    assert (found.policy.speculative.method, found.policy.speculative.num_speculative_tokens) == ("mtp", 1)
    off, _ = scenario("vllm", text, hardware="dgx-h200", overrides=["policy.speculative=null"])
    assert off.policy.speculative is None
    draft = f"serve {LLAMA} --spec-model x/draft-1B --spec-tokens 3"
    assert "draft_parameters" in refusal("vllm", draft, overrides=["policy.speculative.acceptance=0.8"])
    _, report = scenario("vllm", f"serve {LLAMA} --spec-method medusa --spec-tokens 3")
    assert "'medusa'" in report.warnings[0]


def test_adapters_offload_and_weights() -> None:
    text = f"serve {LLAMA} --enable-lora --max-loras 4 --lora-modules a=1 b=2 c=3 --kv-offloading-size 64 -q fp8"
    found, _ = scenario("vllm", text)
    assert found.policy.lora is not None
    assert (found.policy.lora.num_adapters, found.policy.lora.max_loras, found.policy.lora.max_cpu_loras) == (3, 4, 4)
    assert found.policy.kv_offload is not None
    assert found.policy.kv_offload.capacity == 64 * GIB
    assert (found.model.linear_dtype, found.model.dtype) == ("fp8", "bf16")
    assert "policy.lora.num_adapters" in refusal("vllm", f"serve {LLAMA} --enable-lora")
    _, report = scenario("vllm", f"serve {LLAMA} --max-loras 2 --quantization torchao --kv-cache-dtype nvfp4")
    assert [name in "".join(report.warnings) for name in ("--max-loras", "torchao", "nvfp4")] == [True] * 3
    connector = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both",
                 "kv_connector_extra_config": {"cpu_bytes_to_use": 1e9, "block_size": 64}}  # fmt: skip
    found, _ = scenario("vllm", f"serve {LLAMA} --kv-transfer-config '{json.dumps(connector)}'")
    assert found.policy.kv_offload is not None
    assert (found.policy.kv_offload.capacity, found.policy.kv_offload.block_size) == (1e9, 64)
    side = '{"kv_connector": "NixlConnector", "kv_role": "kv_producer"}'
    _, report = scenario("vllm", f"serve {LLAMA} --kv-transfer-config '{side}'")
    assert "prefill" in report.warnings[0]


def test_sglang_counts_its_gpus_otherwise() -> None:
    """--tp-size is the whole stage: attention-parallel ranks divide it, and its limits are for all of them."""
    text = "python -m sglang.launch_server --model-path deepseek-ai/DeepSeek-V3 --tp 8 {} --moe-a2a-backend deepep"
    for spelling in ("--dp 8 --enable-dp-attention", "--attn-dp-size 8"):
        found, report = scenario("sglang", text.format(spelling) + " --max-running-requests 1024", hardware="dgx-b200")
        assert (found.parallel.tp, found.parallel.dp, found.parallel.ep, found.deployment.groups[0].count) == (
            1,
            8,
            8,
            1,
        )
        assert (found.policy.max_num_batched_tokens, found.policy.max_num_seqs) == (16384 // 8, 128)
        assert any("vLLM" in warning for warning in report.warnings)
    dense, _ = scenario("sglang", f"sglang serve {LLAMA} --tp-size 2 --dp-size 2 --context-length 32Ki")
    assert (dense.parallel.gpus, dense.deployment.groups[0].count, dense.policy.max_model_len) == (2, 2, 32768)
    assert "divisor" in refusal("sglang", "serve deepseek-ai/DeepSeek-V3 --tp 8 --attn-dp-size 3")
    assert "expected one model" in refusal("sglang", f"serve --log-requests {LLAMA}")  # a switch takes no value
    assert "'--tp-size'" in refusal("sglang", f"serve {LLAMA} --tp_size 2")  # argparse, no underscores


@pytest.mark.parametrize(("engine", "flags", "chosen"), [
    ("sglang", "", None), ("sglang", "--moe-a2a-backend none", None),
    ("sglang", "--moe-a2a-backend deepep", "deepep_auto"),
    ("sglang", "--moe-a2a-backend deepep --deepep-mode low_latency", "deepep_low_latency"),
    ("sglang", "--moe-a2a-backend deepep --deepep-mode normal", "deepep_high_throughput"),
    ("vllm", "", None), ("vllm", "--all2all-backend deepep_low_latency", "deepep_low_latency"),
    ("vllm", "--all2all-backend pplx", "allgather_reducescatter"),
])  # fmt: skip
def test_what_carries_tokens_to_their_experts(engine: str, flags: str, chosen: str | None) -> None:
    ranks = {"sglang": "--tp 8 --dp 8 --enable-dp-attention --ep-size 8", "vllm": "-dp 8 -ep"}[engine]
    found, report = scenario(engine, f"serve deepseek-ai/DeepSeek-V3 {ranks} {flags}", hardware="dgx-b200")
    assert (found.parallel.ep, found.policy.all2all_backend) == (8, chosen)
    assert not any("a2a" in warning or "all2all" in warning for warning in report.warnings)


def test_other_exchanges_and_exchanges_without_ranks_are_named() -> None:
    model = "serve deepseek-ai/DeepSeek-V3"
    found, report = scenario("vllm", f"{model} -dp 8 -ep --all2all-backend mori_low_latency", hardware="dgx-b200")
    assert found.policy.all2all_backend == "all_to_all"
    assert any("--all2all-backend: not modelled: 'mori_low_latency'" in warning for warning in report.warnings)
    found, report = scenario("sglang", f"{model} --tp 8 --moe-a2a-backend deepep", hardware="dgx-b200")
    assert found.policy.all2all_backend is None
    assert any("--moe-a2a-backend: without effect" in warning for warning in report.warnings)
    _, report = scenario("sglang", f"{model} --tp 8 --ep-size 8 --deepep-mode normal", hardware="dgx-b200")
    assert any("--deepep-mode: without effect" in warning for warning in report.warnings)


def test_sglang_defaults_go_by_memory() -> None:
    found, _ = scenario("sglang", f"serve {LLAMA}")
    policy = found.policy
    assert (policy.max_num_batched_tokens, policy.block_size, policy.memory_rule) == (8192, 1, "sglang")
    # 80 GiB less 512 MiB, 8192 x 1.5, 1/8 GiB, 256 x 2 and 8 for each of 58 prefill graphs (memory_hook.py)
    graphs = 8 + 14 + 8 + 8 + 12 + 8
    reserved = 512 + 8192 * 1.5 + 1024 / 8 + 256 * 2 + 8 * graphs
    assert policy.gpu_memory_utilization == pytest.approx((80 * 1024 - reserved) / (80 * 1024), abs=5e-4)
    small, _ = scenario("sglang", f"serve {LLAMA} --page-size 16 --max-total-tokens 64k", hardware="l40s")
    assert (small.policy.max_num_batched_tokens, small.policy.kv_cache_blocks) == (4096, 4001)
    text = f"serve {LLAMA} --enable-hierarchical-cache"
    assert "policy.kv_offload.capacity" in refusal("sglang", text)
    host, _ = scenario("sglang", f"{text} --hicache-size 30 --tp 2")
    assert host.policy.kv_offload is not None
    assert host.policy.kv_offload.capacity == 60 * GB


def test_sglang_drafts() -> None:
    """Its own choice for Llama is a tree of five steps (speculative_hook.py), of which only a chain is modelled."""
    accepted = {"overrides": ["policy.speculative.acceptance=0.7"]}
    found, report = scenario("sglang", f"serve {LLAMA} --speculative-algorithm EAGLE3", **accepted)
    assert found.policy.speculative is not None
    assert (found.policy.speculative.method, found.policy.speculative.num_speculative_tokens) == ("eagle", 5)
    assert any("--speculative-eagle-topk" in warning for warning in report.warnings)
    text = f"serve {LLAMA} --speculative-algorithm NGRAM"
    assert "--speculative-num-draft-tokens" in refusal("sglang", text, **accepted)
    assert "acceptance" in refusal("sglang", f"{text} --speculative-num-draft-tokens 4")


def test_trtllm_takes_an_options_file(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(
        "tensor_parallel_size: 4\nenable_attention_dp: true\nprint_iter_log: true\nenable_chunked_prefill: true\n"
        "kv_cache_config: {free_gpu_memory_fraction: 0.8, tokens_per_block: 64, enable_block_reuse: false, "
        "dtype: fp8}\ncuda_graph_config: {enable_padding: true}\n"
    )
    text = f"trtllm-serve Qwen/Qwen3-30B-A3B --tp_size 2 --max-batch-size 64 --extra_llm_api_options {file} --host x"
    found, report = scenario("trtllm", text)
    assert (found.parallel.tp, found.parallel.dp) == (1, 4)
    policy = found.policy
    assert (policy.max_num_seqs, policy.block_size, policy.gpu_memory_utilization) == (64, 64, 0.8)
    assert (policy.enable_prefix_caching, policy.kv_cache_dtype, policy.memory_rule) == (False, "fp8", "trtllm")
    told = "\n".join(report.warnings)
    assert "cuda_graph_config.enable_padding" in told
    assert "print_iter_log" not in told
    assert "unverified" in told
    assert "unknown flag" in refusal("trtllm", f"trtllm-serve {LLAMA} --tp 2")  # click has no abbreviations


@pytest.mark.parametrize("engine", ["sglang", "trtllm"])
def test_an_engine_without_a_profile_borrows_one_and_says_so(engine: str) -> None:
    found, _ = scenario(engine, f"serve {LLAMA}")
    assert found.calibration.engine.name == engine
    assert "vllm" in str(found.calibration.engine_borrowed)
    again = found.replace(**{"policy.max_num_seqs": 32})
    assert again.calibration == found.calibration


def test_the_rules_of_memory_differ() -> None:
    """With one fraction for all: SGLang's leaves out activations, TensorRT-LLM's the weights too."""
    sizes = {}
    for rule in ("vllm", "sglang", "trtllm"):
        found, _ = scenario(
            "vllm", f"serve {LLAMA} --gpu-memory-utilization 0.8", overrides=[f"policy.memory_rule={rule}"]
        )
        sizes[rule] = plan_replica(found).memory
    weights, runtime = sizes["vllm"].weights, sizes["vllm"].runtime
    assert sizes["sglang"].kv_cache - sizes["vllm"].kv_cache == pytest.approx(
        sizes["vllm"].activations + 0.2 * runtime, rel=0.01
    )
    assert sizes["trtllm"].kv_cache - sizes["vllm"].kv_cache == pytest.approx(
        0.2 * (weights + runtime + sizes["vllm"].activations), rel=0.01
    )


def test_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    line = f"serve {LLAMA} --max-num-seqs 64 --disable-cascade-attn --api-key k"
    argv = ["simulate", "--vllm", line, "--hardware", "h100", "--rate", "5", "--set", "workload.num_requests=20"]
    assert main([*argv, "--format", "json"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert "--disable-cascade-attn" in printed.err
    assert "--api-key" in printed.err
    assert any("--disable-cascade-attn" in warning for warning in result["warnings"])
    assert result["provenance"]["command_line"]["ignored"] == ["--api-key"]
    assert result["scenario"]["policy"]["max_num_seqs"] == 64
    assert main(["estimate", "--vllm", f"serve {LLAMA} --max-num-sqes 4"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["simulate", "--vllm", "serve x", "--sglang", "serve x"]) == 2
    capsys.readouterr()
    assert main(["estimate", "--sglang", f"serve {LLAMA}", "--format", "json"]) == 0
    assert any("profile of vllm" in text for text in json.loads(capsys.readouterr().out)["warnings"])


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab -=\"'\\$(){}#;&|<>\n\t.,[]1é"), max_size=40))
def test_no_text_breaks_the_reader(text: str) -> None:
    """Whatever is pasted is a scenario's command line or one InputError."""
    readers: tuple[Callable[[], Any], ...] = (
        lambda: split_commands(text), lambda: read_command("vllm", f"vllm serve x {text}")
    )  # fmt: skip
    messages = []
    for reader in readers:
        try:
            reader()
        except InputError as error:
            messages.append(str(error))
    assert not any("\n" in message for message in messages)


@given(st.lists(st.text(max_size=8).filter(lambda word: "\0" not in word), min_size=1, max_size=5))
def test_quoted_words_come_back(words: list[str]) -> None:
    """What a shell quotes, we read back: the oracle is shlex.quote."""
    text = "program " + " ".join(shlex.quote(word) for word in words)
    expected = [word.replace("\\\n", " ").replace("\r\n", "\n") for word in words]
    assert split_commands(text)[0].words == ["program", *expected]
