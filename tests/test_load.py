"""Scenario files and flags become resolved scenarios, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from perfsim.errors import InfeasibleError, InputError
from perfsim.spec import catalog
from perfsim.spec.engine_defaults import batch_defaults, resolve_policy
from perfsim.spec.load import file_hash, find_calibration, load_scenario
from perfsim.spec.policy import ServingPolicy
from perfsim.spec.save import scenario_yaml
from perfsim.spec.scenario import Scenario
from perfsim.spec.workload import TraceWorkload

BASE: dict[str, Any] = {
    "model": "llama-2-7b-hf",
    "hardware": "a100-80gb-sxm",
    "workload": {
        "kind": "synthetic",
        "num_requests": 10,
        "arrivals": {"kind": "poisson", "rate": 1},
        "prompt": {"kind": "fixed", "tokens": 100},
        "output": {"kind": "fixed", "tokens": 10},
    },
}
TRACE = "arrival_s,prompt_tokens,output_tokens\n0.0,10,5\n1.0,20,5\n"


def write(path: Path, **changes: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**BASE, **changes}))
    return path


def test_defaults_are_vllms_for_the_device(tmp_path: Path) -> None:
    scenario = load_scenario(write(tmp_path / "s.yaml"))
    assert (scenario.policy.max_num_batched_tokens, scenario.policy.max_num_seqs) == (2048, 256)
    assert scenario.policy.max_model_len == 4096
    scenario = load_scenario(write(tmp_path / "s.yaml"), hardware="h100-80gb-sxm")
    assert (scenario.policy.max_num_batched_tokens, scenario.policy.max_num_seqs) == (8192, 1024)


@pytest.mark.parametrize(
    ("accelerator", "expected"),
    [
        ("b200-180gb-sxm", (16384, 1024)),
        ("h200-141gb-sxm", (8192, 1024)),
        ("a100-80gb-sxm", (2048, 256)),
        ("l40s-48gb", (2048, 256)),
    ],
)
def test_batch_defaults(accelerator: str, expected: tuple[int, int]) -> None:
    assert batch_defaults(catalog.accelerator(accelerator)) == expected


def policy(**values: Any) -> ServingPolicy:
    model, accelerator = catalog.model("llama-2-7b-hf"), catalog.accelerator("a100-80gb-sxm")
    return resolve_policy(ServingPolicy(**values), model=model, accelerator=accelerator)


def test_batch_settings_limit_each_other_as_in_vllm() -> None:
    assert policy(max_num_batched_tokens=100).max_num_seqs == 100
    assert policy(max_num_seqs=2, max_model_len=64).max_num_batched_tokens == 128
    assert policy(enable_chunked_prefill=False).max_num_batched_tokens == 4096
    with pytest.raises(InputError, match="at least max_model_len"):
        policy(enable_chunked_prefill=False, max_num_batched_tokens=1000)
    with pytest.raises(InputError, match=r"max_num_seqs: expected at most max_num_batched_tokens \(2048\)"):
        policy(max_num_seqs=4096)
    with pytest.raises(InputError, match="max_position_embeddings"):
        policy(max_model_len=8192)


def test_flags_lie_over_the_file_and_set_over_the_flags(tmp_path: Path) -> None:
    file = write(tmp_path / "s.yaml", seed=1, slo={"ttft": {"p95": "2s", "p50": "1s"}})
    scenario = load_scenario(file, seed=2, tp=2, slo=["ttft.p95=500ms"], overrides=["seed=3", "policy.max_num_seqs=7"])
    assert (scenario.seed, scenario.parallel.tp, scenario.policy.max_num_seqs) == (3, 2, 7)
    assert scenario.slo.ttft == {"p95": 0.5, "p50": 1.0}


def test_a_trace_flag_replaces_a_synthetic_workload_and_keeps_the_settings_of_a_trace(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text(TRACE)
    workload = load_scenario(write(tmp_path / "s.yaml"), trace=str(trace)).workload
    assert workload == TraceWorkload(trace=str(trace), content_hash=file_hash(trace))
    file = write(tmp_path / "s.yaml", workload={"kind": "trace", "trace": "absent", "time_scale": 2})
    workload = load_scenario(file, trace=str(trace)).workload
    assert isinstance(workload, TraceWorkload)
    assert workload.time_scale == 2


def test_paths_in_a_file_are_relative_to_it_and_in_flags_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "t.csv").write_text(TRACE)
    (tmp_path / "t.csv").write_text(TRACE + "2.0,30,5\n")
    file = write(tmp_path / "here" / "s.yaml", workload={"kind": "trace", "trace": "t.csv"})
    monkeypatch.chdir(tmp_path)
    in_file, flag = load_scenario(file).workload, load_scenario(file, trace="t.csv").workload
    by_set = load_scenario(file, overrides=["workload.trace=t.csv"]).workload
    assert isinstance(in_file, TraceWorkload)
    assert isinstance(flag, TraceWorkload)
    assert in_file.content_hash == file_hash(tmp_path / "here" / "t.csv")
    assert flag.content_hash == file_hash(tmp_path / "t.csv")
    assert by_set == flag


def test_the_hash_covers_the_content_of_a_trace_and_not_its_path(tmp_path: Path) -> None:
    file = write(tmp_path / "s.yaml")
    paths = [tmp_path / "a.csv", tmp_path / "b.csv", tmp_path / "c.csv"]
    for path, text in zip(paths, [TRACE, TRACE, TRACE + "2.0,30,5\n"], strict=True):
        path.write_text(text)
    first, second, third = (load_scenario(file, trace=str(path)).hash for path in paths)
    assert first == second != third
    portable = load_scenario(file, trace=str(paths[0])).portable()
    assert portable["workload"]["trace"] == "a.csv"
    assert str(tmp_path) not in str(portable)


def test_a_changed_trace_is_noticed(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text(TRACE)
    saved = tmp_path / "saved.yaml"
    saved.write_text(scenario_yaml(load_scenario(write(tmp_path / "s.yaml"), trace=str(trace)), directory=tmp_path))
    assert load_scenario(saved).workload.kind == "trace"
    trace.write_text(TRACE + "2.0,30,5\n")
    with pytest.raises(InputError, match="content_hash"):
        load_scenario(saved)
    assert load_scenario(saved, trace=str(trace)).workload.kind == "trace"


@pytest.mark.parametrize("name", ["default", "mooncake-demo"])
def test_a_saved_scenario_loads_as_itself(name: str, tmp_path: Path) -> None:
    scenario = load_scenario(name)
    saved = tmp_path / "scenario.yaml"
    saved.write_text(scenario_yaml(scenario, directory=tmp_path))
    assert load_scenario(saved) == scenario


def test_what_the_catalogue_does_not_know_is_saved_in_full(tmp_path: Path) -> None:
    scenario = load_scenario("default")
    faster = scenario.hardware.accelerator.model_copy(update={"sm_count": 1000})
    engine = scenario.calibration.engine.model_copy(update={"step_host": 1.0})
    changed = scenario.model_copy(
        update={
            "model": scenario.model.model_copy(update={"hidden_size": 4000}),
            "hardware": scenario.hardware.model_copy(update={"accelerator": faster}),
            "calibration": scenario.calibration.model_copy(update={"engine": engine}),
        }
    )
    saved = tmp_path / "scenario.yaml"
    saved.write_text(scenario_yaml(changed, directory=tmp_path))
    again = load_scenario(saved)
    assert again == changed
    assert again.hash == changed.hash != scenario.hash
    # Coefficients belong to a device: they do not follow the scenario to another one.
    assert load_scenario(saved, hardware="a100-80gb-sxm").calibration == find_calibration(
        accelerator="a100-80gb-sxm", engine="vllm"
    )


def test_replace_changes_what_is_named_and_chooses_defaults_again() -> None:
    scenario = Scenario.load("default")
    other = scenario.replace(hardware="a100-80gb-sxm", seed=5, **{"parallel.tp": 2, "workload.arrivals.rate": 3})
    assert (other.hardware.accelerator.name, other.seed, other.parallel.tp) == ("a100-80gb-sxm", 5, 2)
    assert other.name == "llama-3.1-8b-instruct on 2x a100-80gb-sxm"
    assert (other.policy.max_num_batched_tokens, other.policy.max_num_seqs) == (2048, 256)
    assert other.replace(
        hardware=scenario.hardware, seed=0, **{"parallel": {"tp": 1}, "workload": scenario.workload}
    ) == (scenario)
    with pytest.raises(InputError, match=r"replace\(parallel.tpp\).*did you mean 'tp'"):
        scenario.replace(**{"parallel.tpp": 2})


def test_a_device_without_curves_borrows_its_relatives() -> None:
    assert find_calibration(accelerator="h100-80gb-sxm", engine="vllm").borrowed_from is None
    assert find_calibration(accelerator="l4-24gb", engine="vllm").borrowed_from == "l40s-48gb"
    unknown = find_calibration(accelerator="somebodys-npu", engine="vllm")
    assert unknown.borrowed_from == "h100-80gb-sxm"
    own, borrowed = find_calibration(accelerator="h100-80gb-sxm", engine="vllm").device, unknown.device
    assert borrowed.gemm_bandwidth == own.gemm_bandwidth
    assert borrowed.curves.gemm == own.curves.gemm  # the same curves, held to be less sure
    assert all(borrowed.curves.discrepancy[kind] >= sure for kind, sure in own.curves.discrepancy.items())


def test_heads_must_divide_and_gpus_must_exist(tmp_path: Path) -> None:
    file = write(tmp_path / "s.yaml")
    with pytest.raises(InputError, match="32 attention heads"):
        load_scenario(file, tp=3)
    with pytest.raises(InfeasibleError, match="16 GPUs") as caught:
        load_scenario(file, tp=16)
    assert caught.value.binding == "accelerators"


BAD_VALUES: list[tuple[list[str], str]] = [
    (["paralel.tp=8"], "--set paralel.tp: paralel: unknown key 'paralel'; did you mean 'parallel'?"),
    (["parallel.tpp=8"], "--set parallel.tpp: unknown key 'tpp'; did you mean 'tp'?"),
    (["cluster=dgx-h100-superpod"], "--set cluster: unknown key 'cluster'; expected one of calibration"),
    (["parallel.tp=1", "parallel.tp.x=8"], "--set parallel.tp.x: 'parallel.tp' is a value, not a section of keys"),
    (["parallel.tp=eight"], "--set parallel.tp: expected an integer, got 'eight'"),
    (["parallel.tp=-1"], "--set parallel.tp: expected a number greater than 0, got -1"),
    (["parallel.tp=1e99"], "--set parallel.tp: expected an integer"),
    (["parallel.tp=99999999999999999999"], "--set parallel.tp: expected a number of at most 1024"),
    (["parallel=8"], "--set parallel: expected a section of keys, got 8"),
    (["workload.arrivals.rate=.nan"], "--set workload.arrivals.rate: value '.nan': line 1: expected a finite number"),
    (["workload.arrivals.rate=.inf"], "--set workload.arrivals.rate"),
    (["workload.arrivals.rate=0"], "--set workload.arrivals.rate: expected a number greater than 0, got 0"),
    (["workload.arrivals.kind=poison"], "gamma, poisson, quantised, stages, got 'poison'; did you mean 'poisson'?"),
    (["workload.arrivals={rate: 1}"], "--set workload.arrivals: the key 'kind' is missing"),
    (["workload.arrivals.cv=1"], "--set workload.arrivals.cv: unknown key 'cv'"),
    (["policy.kv_cache_memory=5s"], "--set policy.kv_cache_memory: 's' is not a unit of bytes"),
    (["policy.kv_cache_memory=-5GB"], "--set policy.kv_cache_memory: expected a number of at least 0"),
    (["policy.scheduling_policy=fifo"], "expected one of fcfs, priority, got 'fifo'; did you mean 'fcfs'?"),
    (["policy.max_num_seqs=64", "policy.max_num_batched_tokens=8"], "must be at least max_num_seqs"),
    (["slo.ttft.p95=5GB"], "--set slo.ttft.p95: 'GB' is not a unit of seconds"),
    (["slo.ttft.p42=5s"], "expected one of mean, p50, p90, p95, p99, got 'p42'"),
    (["workload=~"], "--set workload: expected a section of keys, got nothing"),
    (["model=5"], "--set model: expected text, got 5"),
    (["model=lama-2-7b-hf"], "did you mean 'llama-2-7b-hf'?"),
    (["hardware=h100-80gb-smx"], "did you mean 'h100-80gb-sxm'?"),
    (["engine=vlm"], "did you mean 'vllm'?"),
    (
        ["engine_version=0.20"],
        "--set engine_version: expected a version in quotes such as '0.19.0', got the number 0.2",
    ),
    (["engine_version=latest"], "--set engine_version: expected a version such as '0.19.0', got 'latest'"),
    (["engine_version=[0, 19]"], "--set engine_version: expected a version such as '0.19.0', got a list"),
    (["engine_version=0.19.0 please"], "--set engine_version: expected a version such as '0.19.0'"),
    (["parallel.tp"], "--set: expected KEY=VALUE such as parallel.tp=8, got 'parallel.tp'"),
    (["=8"], "--set: expected KEY=VALUE"),
    (["a..b=8"], "--set: expected KEY=VALUE"),
    (["parallel.tp=[1, 2"], "--set parallel.tp: value '[1, 2'"),
    (["model=!!python/object/apply:os.system ['true']"], "is not allowed"),
    (["seed=-1", "parallel.tp=0"], "(and 1 more)"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD_VALUES, ids=lambda value: str(value)[:40])
def test_bad_values_name_their_place(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_scenario(write(tmp_path / "s.yaml"), overrides=overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_problem_in_the_file_names_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "s.yaml", parallel={"tp": 0})
    with pytest.raises(InputError, match=r"s\.yaml: parallel\.tp: expected a number greater than 0, got 0"):
        load_scenario(file)
    file.write_text("model: x\nmodle: y\n")
    with pytest.raises(InputError, match=r"s\.yaml: modle: unknown key 'modle'; did you mean 'model'\?"):
        load_scenario(file)
    file.write_text("model: x\n")
    with pytest.raises(InputError, match=r"s\.yaml: the key 'hardware' is missing \(and 1 more\)"):
        load_scenario(file)
    with pytest.raises(InputError, match=r"unknown scenario 'mooncake-dem'.*did you mean 'mooncake-demo'"):
        load_scenario("mooncake-dem")


def test_a_problem_below_a_union_is_placed_without_pydantics_tags(tmp_path: Path) -> None:
    workload = {"kind": "trace", "trace": "x", "arrivals": {"kind": "gamma", "rate": -1, "cv": 1}}
    file = write(tmp_path / "s.yaml", workload=workload)
    with pytest.raises(InputError, match=r"s\.yaml: workload\.arrivals\.rate: expected a number greater than 0, got"):
        load_scenario(file)
    attention = {"kind": "gqa", "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 1, "window": "x"}
    layers = [{"count": 1, "attention": attention, "mlp": {"kind": "dense", "intermediate_size": 1}}]
    model = {"name": "m", "architecture": "a", "hidden_size": 1, "vocab_size": 1, "layers": layers}
    file = write(tmp_path / "s.yaml", model={**model, "max_position_embeddings": 1})
    with pytest.raises(InputError, match=r"s\.yaml: model\.layers\.0\.attention\.window: expected an integer"):
        load_scenario(file)
