"""Steps without CUDA graphs: laws of the launches, exact jumps, how engines say it, and the fit of the host's time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from batches import batch_shape
from hypothesis import given, settings
from hypothesis import strategies as st

from perfsim.cli.main import main
from perfsim.cost.launches import kernels_launched, launch_seconds
from perfsim.cost.step import step_estimate
from perfsim.cost.step_model import compile_steps
from perfsim.errors import InputError
from perfsim.ops.step import attention_spans
from perfsim.run import estimate, simulate
from perfsim.spec import catalog
from perfsim.spec.launches_file import LAUNCHES, LaunchesFile, launch_host
from perfsim.spec.load import Draft, find_calibration
from perfsim.spec.policy import ServingPolicy
from perfsim.spec.problems import validated
from perfsim.spec.scenario import Scenario
from perfsim.spec.yaml import load_yaml
from validation.engines import launches

CALIBRATION = Path(__file__).resolve().parents[1] / "hardware" / "calibration"
LLAMA = "meta-llama/Llama-3.1-8B"
GRAPHS, EAGER = ServingPolicy(), ServingPolicy(enforce_eager=True)
MODELS = ("llama-3.1-8b-instruct", "qwen3-30b-a3b", "deepseek-v2-lite", "openai--gpt-oss-20b")

cases = st.tuples(
    st.sampled_from(MODELS), st.sampled_from(("dgx-h100", "dgx-a100")), st.sampled_from((1, 2, 4)), st.booleans()
)
pasts = st.lists(st.integers(0, 4000), max_size=48)
chunks = st.lists(st.tuples(st.integers(1, 400), st.integers(0, 4000)), max_size=3)


def scenario(**values: object) -> Scenario:
    content = {
        "model": "llama-3.1-8b-instruct", "hardware": "dgx-h100", "seed": 3,
        "workload": {
            "kind": "synthetic",
            "arrivals": {"kind": "poisson", "rate": 8.0}, "num_requests": 60,
            "prompt": {"kind": "fixed", "tokens": 300}, "output": {"kind": "fixed", "tokens": 80},
        },
    }  # fmt: skip
    draft = Draft(content, source="test")
    for key, value in values.items():
        draft.set(key.replace("__", "."), value, flag=key)
    return draft.resolve()


def seconds(case: tuple[str, str, int, bool], past: list[int], new: list[tuple[int, int]], policy: ServingPolicy):
    """(explained, compiled) seconds of one step."""
    name, machine, tp, ahead = case
    model, node = catalog.model(name), catalog.node(machine)
    how = {
        "model": model, "node": node, "tp": tp, "policy": policy, "async_scheduling": ahead,
        "calibration": find_calibration(accelerator=node.accelerator.name, engine="vllm"),
    }  # fmt: skip
    step = batch_shape(model, past, new)
    steps = compile_steps(max_num_batched_tokens=2048, max_num_seqs=64, **how)
    sums = [tuple(map(int, each)) for each in (step.decode_context, step.prefill_pairs, step.prefill_context)]
    compiled = steps.step_seconds(
        int(step.tokens), int(step.logits), int(step.decode_sequences), sums[0], int(step.prefill_tokens), *sums[1:],
        longest=(int(step.decode_longest), int(step.prefill_longest)),
    )  # fmt: skip
    return float(step_estimate(step, **how).seconds), compiled


@settings(max_examples=30, deadline=None)
@given(cases, pasts, chunks)
def test_eager_steps_never_take_less_and_both_forms_agree(case, past, new) -> None:
    if not past and not new:
        past = [100]
    graphs, eager = seconds(case, past, new, GRAPHS), seconds(case, past, new, EAGER)
    assert graphs[0] == pytest.approx(graphs[1], rel=1e-12)
    assert eager[0] == pytest.approx(eager[1], rel=1e-12)
    assert eager[0] >= graphs[0] * (1 - 1e-12)


@pytest.mark.parametrize("ahead", [True, False])
def test_launches_hide_behind_a_long_prompt_and_show_with_few_tokens(ahead: bool) -> None:
    case = ("llama-3.1-8b-instruct", "dgx-h100", 1, ahead)
    assert seconds(case, [], [(2048, 0)], EAGER) == pytest.approx(seconds(case, [], [(2048, 0)], GRAPHS), rel=1e-12)
    profile = find_calibration(accelerator="h100-80gb-sxm", engine="vllm").engine
    launch = launch_seconds(catalog.model(case[0]), profile, tp=1, policy=EAGER)
    expected = profile.step_host + profile.schedule_host + launch  # the host is the longer one either way
    assert seconds(case, [50], [], EAGER)[1] == pytest.approx(expected, rel=1e-12)


def test_launches_follow_the_layers_and_tensor_parallelism_adds_its_collectives() -> None:
    model = catalog.model("llama-3.1-8b-instruct")
    profile = find_calibration(accelerator="h100-80gb-sxm", engine="vllm").engine

    def count(layers: int, tp: int) -> int:
        group = model.layers[0].model_copy(update={"count": layers})
        return kernels_launched(model.model_copy(update={"layers": (group,)}), profile, tp=tp, policy=EAGER)

    each = count(2, 1) - count(1, 1)
    assert each == 9  # four products, attention, two norms, positions, activation
    assert count(32, 1) - count(16, 1) == 16 * each
    assert count(32, 2) == count(32, 8) == count(32, 1) + 2 * 32 + 1  # two sums per layer, the logits
    assert launch_seconds(model, profile, tp=1, policy=GRAPHS) == 0.0


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("factor", [0.2, 1.0, 5.0])
def test_a_run_of_steps_is_its_steps(ahead: bool, factor: float) -> None:
    """The kernels overtake the launches within a run, before it, or never."""
    model, node = catalog.model("llama-3.1-8b-instruct"), catalog.node("dgx-h100")
    calibration = find_calibration(accelerator="h100-80gb-sxm", engine="vllm")
    probe = compile_steps(model=model, node=node, tp=1, calibration=calibration, max_num_batched_tokens=512,
                          max_num_seqs=64, async_scheduling=ahead)  # fmt: skip
    context = 64 * 2000
    gpu = probe.on_gpu().step_seconds(64, 64, 64, (context,), 0, (0,), (0,))
    count = kernels_launched(model, calibration.engine, tp=1, policy=EAGER)
    engine = calibration.engine.model_copy(update={"launch_host": factor * 1.02 * gpu / count, "schedule_host": 0.0})
    steps = compile_steps(
        model=model, node=node, tp=1, calibration=calibration.model_copy(update={"engine": engine}),
        max_num_batched_tokens=512, max_num_seqs=64, async_scheduling=ahead, policy=EAGER,
    )  # fmt: skip
    done, pieces = 0, 0
    while done < 400:
        run = steps.decode_run(64, (context + 64 * done,), (64,), 400 - done)
        for index in (0, run.max_steps - 1):
            alone = steps.step_seconds(64, 64, 64, (context + 64 * (done + index),), 0, (0,), (0,))
            assert run.first_s + index * run.slope_s == pytest.approx(alone, rel=1e-12)
        done, pieces = done + run.max_steps, pieces + 1
    assert pieces > 1 if factor == 1.0 else pieces < 400
    assert len(attention_spans(model)) == 1


@pytest.mark.parametrize(
    "more",
    [
        {}, {"policy__async_scheduling": False}, {"parallel__pp": 2}, {"parallel__tp": 2, "policy__mixed_steps": False},
        {"model": "qwen3-30b-a3b", "parallel__dp": 2, "parallel__ep": 2, "hardware": "dgx-a100"},
    ],
)  # fmt: skip
def test_whole_runs_jump_exactly_and_their_parts_add_up(more: dict[str, object]) -> None:
    found = scenario(policy__enforce_eager=True, **more)
    jumps = simulate(found, bands=False)
    if "parallel__pp" not in more:
        single = simulate(found, bands=False, stepwise=True)
        for name in ("ttft", "tpot", "e2e"):
            assert jumps.metrics[name]["mean"] == pytest.approx(single.metrics[name]["mean"], rel=1e-9)
    graphs = simulate(scenario(**more), bands=False)
    assert jumps.metrics["tpot"]["mean"] > 1.1 * graphs.metrics["tpot"]["mean"]
    assert jumps.breakdown["launches"] > 0.0
    assert "launches" not in graphs.breakdown


def test_the_closed_form_has_it_and_bands_are_wide() -> None:
    eager, graphs = scenario(policy__enforce_eager=True), scenario()
    assert estimate(eager, bands=False).metrics["tpot"]["mean"] > estimate(graphs, bands=False).metrics["tpot"]["mean"]
    result = simulate(eager, bands=True)
    assert "h100-80gb-sxm launch" in result.provenance["uncertainty"]["factors"]
    low, high = result.bands["tpot.mean"]
    assert high / low > 1.5
    assert "h100-80gb-sxm launch" not in simulate(graphs, bands=True).provenance["uncertainty"]["factors"]


def test_an_eager_engine_compiles_the_kernels_of_experts_as_they_come() -> None:
    found = scenario(model="qwen3-30b-a3b")
    waits = [
        simulate(found.replace(**{"policy.enforce_eager": eager}), bands=False).breakdown.get("compiling", 0.0)
        for eager in (False, True)
    ]
    assert waits[1] > waits[0]


@pytest.mark.parametrize(
    ("engine", "text", "eager"),
    [
        ("vllm", f"serve {LLAMA} --enforce-eager", True),
        ("vllm", f"serve {LLAMA} --no-enforce-eager", False),
        ("vllm", f"serve {LLAMA}", False),
        ("sglang", f"serve {LLAMA} --disable-cuda-graph", True),
        ("sglang", f"serve {LLAMA}", False),
        ("trtllm", f"serve {LLAMA}", False),
    ],
)
def test_engines_say_it_in_their_own_words(engine: str, text: str, eager: bool, capsys) -> None:
    argv = ["simulate", f"--{engine}", text, "--hardware", "h100", "--rate", "5", "--set", "workload.num_requests=5"]
    assert main([*argv, "--no-bands", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["scenario"]["policy"]["enforce_eager"] is eager


def test_tensorrt_llm_says_it_by_an_empty_config(tmp_path: Path, capsys) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("cuda_graph_config: null\n")
    text = f"trtllm-serve {LLAMA} --extra_llm_api_options {file}"
    argv = ["simulate", "--trtllm", text, "--hardware", "h100", "--rate", "5", "--set", "workload.num_requests=5"]
    assert main([*argv, "--no-bands", "--format", "json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["scenario"]["policy"]["enforce_eager"] is True
    assert "cuda_graph_config" not in printed.err


@pytest.mark.parametrize("line", ["--set policy.enforce_eager=perhaps", "--set policy.enforce_eagre=true"])
def test_a_wrong_value_is_one_line_and_exit_code_two(line: str, capsys) -> None:
    assert main(["simulate", "--model", LLAMA, "--hardware", "h100", "--rate", "5", *line.split()]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "enforce_eager" in printed
    assert main(["simulate", "--vllm", f"serve {LLAMA} --enforce-eager=perhaps", "--rate", "5"]) == 2
    assert "--enforce-eager" in capsys.readouterr().err


def test_the_file_is_what_the_committed_rows_give() -> None:
    """Within a standard error, so that finer curves of kernels do not ask for a new fit."""
    rows = launches.read_slice(launches.SLICE)
    measured, steps = launches.launch_seconds(rows), launches.steps_of(rows)
    found = launches.fit(steps, measured)
    packaged = validated(LaunchesFile, load_yaml(CALIBRATION / LAUNCHES), where=LAUNCHES)
    new = validated(
        LaunchesFile,
        load_yaml_text("\n".join(launches.document(rows, steps, measured, found))),
        where="the fit",
    )
    assert (new.sha256, new.rows, new.source, new.range) == (
        packaged.sha256, packaged.rows, packaged.source, packaged.range,
    )  # fmt: skip
    for name in ("ratio", "mean"):
        ours, theirs = getattr(new, name), getattr(packaged, name)
        assert ours.value == pytest.approx(theirs.value, abs=theirs.stderr)
    assert new.devices.keys() == packaged.devices.keys()
    assert np.median(np.abs(found.errors)) < 0.08


def load_yaml_text(text: str) -> dict[str, object]:
    import yaml

    return dict(yaml.safe_load(text))


def test_each_device_has_its_hosts_time_and_others_the_mean(tmp_path: Path) -> None:
    content = validated(LaunchesFile, load_yaml(CALIBRATION / LAUNCHES), where=LAUNCHES)
    for device, fitted in content.devices.items():
        for engine in ("vllm", "sglang", "trtllm"):
            assert find_calibration(accelerator=device, engine=engine).engine.launch_host == fitted.value
    assert launch_host(CALIBRATION, accelerator="l4-24gb") == content.mean.value
    assert launch_host(tmp_path, accelerator="l4-24gb") is None
    (tmp_path / LAUNCHES).write_text("ratio: 1\n", encoding="utf-8")
    with pytest.raises(InputError, match=LAUNCHES):
        launch_host(tmp_path, accelerator="l4-24gb")
