"""The commands people and scripts rely on, on good input."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import perfsim
from perfsim.cli.main import INTERRUPTED, PIPE_CLOSED, main
from perfsim.spec.load import load_scenario

Run = Callable[..., str]

SMALL = [
    "--model", "llama-2-7b-hf", "--hardware", "a100-80gb-sxm", "--set", "workload.num_requests=50", "--seed", "7",
]  # fmt: skip
RUN_FOLDER = {"scenario.yaml", "result.json", "requests.parquet", "trace.pftrace", "report.html", "timing.json"}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a command in an empty directory that must succeed; returns what it printed on standard output."""
    monkeypatch.chdir(tmp_path)

    def call(*argv: str) -> str:
        capsys.readouterr()
        code = main(argv)
        printed = capsys.readouterr()
        assert code == 0, printed.err
        assert "Traceback" not in printed.err
        return printed.out

    return call


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    rows = "".join(f"{0.2 * i},{100 + 7 * i},{1 + i}\n" for i in range(30))
    path.write_text(f"arrival_s,prompt_tokens,output_tokens\n{rows}")
    return path


def simulated(run: Run, *argv: str) -> dict[str, Any]:
    content = json.loads(run("simulate", *argv, "--format", "json"))
    assert isinstance(content, dict)
    return content


def test_the_json_that_scripts_rely_on(run: Run, trace: Path) -> None:
    result = simulated(run, "--model", "llama-2-7b-hf", "--hardware", "a100-80gb-sxm", "--trace", str(trace))
    assert result["schema_version"] == 1
    for metric in ("ttft", "engine_ttft", "tpot", "itl", "e2e"):
        for statistic in ("mean", "p50", "p90", "p95", "p99"):
            assert 0 < result["metrics"][metric][statistic] < 60
    assert result["metrics"]["throughput"]["requests_per_s"] > 0
    assert result["metrics"]["throughput"]["output_tokens_per_s"] > 0
    assert result["simulation"]["requests"] == 30
    assert result["simulation"]["steps"] >= result["simulation"]["segments"] > 0
    assert result["simulation"]["wall_s"] > 0


def test_more_gpus_make_it_faster(run: Run) -> None:
    one, two = simulated(run, *SMALL), simulated(run, *SMALL, "--tp", "2")
    assert two["metrics"]["tpot"]["mean"] < one["metrics"]["tpot"]["mean"]


def test_stepwise_gives_the_same_answer(run: Run) -> None:
    fast, slow = simulated(run, *SMALL), simulated(run, *SMALL, "--stepwise")
    assert slow["metrics"]["e2e"]["mean"] == pytest.approx(fast["metrics"]["e2e"]["mean"], rel=1e-9)
    assert slow["simulation"]["steps"] == fast["simulation"]["steps"]


def test_the_run_folder_is_complete_and_repeats_to_the_byte(run: Run, trace: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine.txt").write_text("keep")
    for name in ("a", "b"):
        run("simulate", *SMALL, "--trace", str(trace), "-o", name)
    assert {path.name for path in (tmp_path / "a").iterdir()} == RUN_FOLDER | {"mine.txt"}
    for name in RUN_FOLDER - {"timing.json"}:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert "wall_s" not in json.loads((tmp_path / "a" / "result.json").read_text())["simulation"]
    assert json.loads((tmp_path / "a" / "timing.json").read_text())["wall_s"] > 0
    assert pq.read_metadata(tmp_path / "a" / "requests.parquet").num_rows == 30
    assert str(tmp_path) not in (tmp_path / "a" / "result.json").read_text()
    assert str(tmp_path) not in (tmp_path / "a" / "report.html").read_text()


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    for name, hash_seed in (("a", "1"), ("b", "2")):
        command = [sys.executable, "-m", "perfsim", "simulate", *SMALL, "-o", str(tmp_path / name)]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        subprocess.run(command, env=environment, check=True, capture_output=True)
    for name in RUN_FOLDER - {"timing.json"}:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_run_folder_runs_again_as_itself(run: Run, trace: Path, tmp_path: Path) -> None:
    run("simulate", *SMALL, "--trace", trace.name, "-o", "a")
    run("simulate", "a/scenario.yaml", "-o", "b")
    for name in RUN_FOLDER - {"timing.json"}:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_seeds_matter(run: Run) -> None:
    assert simulated(run, *SMALL)["metrics"] == simulated(run, *SMALL)["metrics"]
    assert simulated(run, *SMALL)["metrics"] != simulated(run, *SMALL, "--seed", "8")["metrics"]


def test_csv_is_one_metric_per_line(run: Run) -> None:
    rows = list(csv.DictReader(io.StringIO(run("simulate", *SMALL, "--format", "csv"))))
    values = {(row["metric"], row["stat"]): (row["value"], row["unit"]) for row in rows}
    assert float(values["ttft", "p95"][0]) > 0
    assert values["ttft", "p95"][1] == "s"
    assert float(values["simulation.requests", ""][0]) == 50
    assert float(values["simulation.wall_s", ""][0]) > 0


def test_the_table_says_what_matters(run: Run) -> None:
    out = run("simulate", *SMALL, "--slo", "ttft.p95=500ms")
    for word in ("TTFT", "TPOT", "E2E", "p95", "Goodput"):
        assert word in out
    assert "\x1b" not in out


def test_estimate_is_near_simulate_at_low_load(run: Run) -> None:
    few = [*SMALL, "--set", "workload.arrivals.rate=0.5"]
    estimate = json.loads(run("estimate", *few, "--format", "json"))
    assert estimate["metrics"]["tpot"]["mean"] == pytest.approx(
        simulated(run, *few)["metrics"]["tpot"]["mean"], rel=0.2
    )


def test_show_model(run: Run) -> None:
    dense = json.loads(run("show", "model", "llama-2-7b-hf", "--format", "json"))
    assert dense["name"] == "llama-2-7b-hf"
    # 32 layers, K and V, 32 heads of 128, 2 bytes
    assert dense["kv_bytes_per_token"] == 32 * 2 * 32 * 128 * 2
    assert dense["total_params"] == dense["active_params"] == 6_738_415_616
    moe = json.loads(run("show", "model", "mixtral-8x7b-v0.1", "--format", "json"))
    assert moe["active_params"] < moe["total_params"] / 3
    assert "llama-2-7b-hf" in run("show", "model", "LLAMA-2-7B-HF")


def test_show_a_model_file(run: Run, tmp_path: Path) -> None:
    source = Path(perfsim.__file__).parents[1] / "workloads" / "models" / "llama-2-7b-hf.json"
    (tmp_path / "mine.json").write_text(source.read_text())
    shown = json.loads(run("show", "model", "mine.json", "--format", "json"))
    assert shown["total_params"] == 6_738_415_616
    assert json.loads(run("show", "model", "./mine.json", "--format", "json")) == shown


def test_show_hardware_names_sources_and_doubts(run: Run) -> None:
    out = run("show", "hardware", "a100-80gb-sxm")
    assert "312.0 TFLOP/s" in out
    assert "Not verified" in out
    assert json.loads(run("show", "hardware", "dgx-a100", "--format", "json"))["accelerator_count"] == 8


def test_show_scenario_can_be_run(run: Run, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(run("show", "scenario", "default", "--tp", "2"))
    assert load_scenario(tmp_path / "s.yaml") == load_scenario("default", tp=2)
    shown = json.loads(run("show", "scenario", "s.yaml", "--format", "json"))
    assert shown["scenario_hash"] == load_scenario("default", tp=2).hash
    assert "policy.max_num_seqs,1024" in run("show", "scenario", "default", "--format", "csv")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("models", "llama-2-7b-hf"),
        ("hardware", "a100-80gb-sxm"),
        ("hardware", "dgx-h100"),
        ("traces", "mooncake-conversation"),
        ("scenarios", "mooncake-demo"),
    ],
)
def test_list(run: Run, kind: str, name: str) -> None:
    assert name in [row["name"] for row in json.loads(run("list", kind, "--format", "json"))]
    assert f"\n{name}," in run("list", kind, "--format", "csv")
    assert name in run("list", kind)


def test_the_schema_accepts_names_and_knows_every_key(run: Run) -> None:
    schema = json.loads(run("schema"))
    assert {"model", "hardware", "workload"} == set(schema["required"])
    assert {"type": "string"} in schema["properties"]["model"]["oneOf"]
    assert schema["additionalProperties"] is False


def test_doctor_finds_this_installation_well(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert "problem" not in run("doctor")
    assert all(row["ok"] for row in json.loads(run("doctor", "--format", "json")))


def test_doctor_finds_broken_data(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
                                  tmp_path: Path) -> None:  # fmt: skip
    broken = tmp_path / "workloads" / "models" / "broken.json"
    broken.parent.mkdir(parents=True)
    broken.write_text("{}")
    monkeypatch.setenv("PERFSIM_PATH", str(tmp_path))
    assert main(["doctor"]) == 1
    assert "problem  models: broken: " in capsys.readouterr().out


def test_help_and_version(run: Run) -> None:
    assert run("--version") == f"perfsim {perfsim.__version__}\n"
    for verb in ("simulate", "estimate", "list", "show", "schema", "doctor"):
        assert verb in run()
        assert verb in run(verb, "--help")


def test_a_closed_pipe_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "perfsim", "schema"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert done.returncode == PIPE_CLOSED
    assert done.stderr == ""


def test_an_interrupt_is_no_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("perfsim.run.simulate", interrupted)
    assert main(["simulate", *SMALL]) == INTERRUPTED
    assert capsys.readouterr() == ("", "error: interrupted\n")


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: object, **_options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("perfsim.run.simulate", broken)
    with pytest.raises(ZeroDivisionError):
        main(["simulate", *SMALL])


def test_importing_is_light_and_silent() -> None:
    code = "import sys, perfsim; print([m for m in ('numpy', 'pyarrow', 'pandas', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert done.stderr == ""


def test_the_python_api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert set(dir(perfsim)) == {"Result", "Scenario", "__version__", "estimate", "simulate"}
    scenario = perfsim.Scenario.load("default").replace(seed=3, **{"workload.num_requests": 20})
    result = perfsim.simulate(scenario)
    assert isinstance(result, perfsim.Result)
    assert result.metrics["counts"]["completed"] == 20
    with pytest.raises(AttributeError, match="no attribute 'simulat'"):
        getattr(perfsim, "simulat")  # noqa: B009  # spelled out, a type checker refuses the misspelling first
