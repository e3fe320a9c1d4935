"""Every kind of traffic end to end: packaged scenarios run, estimates answer or refuse in one line, runs replay."""

from __future__ import annotations

from pathlib import Path

import pytest

from perfsim.cli.main import main
from perfsim.run import estimate, simulate
from perfsim.spec.load import load_scenario

SMALL = {
    "chat": ["workload.num_sessions=40"],
    "agents": ["workload.num_sessions=6", "workload.arrivals.concurrency=3", "workload.calls.high=8"],
    "rag": ["workload.num_requests=150"],
    "diurnal": ["workload.num_requests=1500", "workload.arrivals.period=60s"],
}


@pytest.mark.parametrize("name", SMALL)
def test_packaged_scenarios_run(name) -> None:
    scenario = load_scenario(name, overrides=SMALL[name])
    one, other = simulate(scenario), simulate(scenario)
    assert one == other
    counts = one.metrics["counts"]
    assert counts["completed"] == counts["requests"] >= 24
    assert (one.value("prefix_cache.hit_rate") > 0.2) == (name != "diurnal")
    slow = simulate(scenario, stepwise=True)
    for path in ("ttft.p95", "e2e.mean", "itl.p99", "makespan_s", "prefix_cache.hit_rate"):
        assert one.value(path) == pytest.approx(slow.value(path), rel=1e-9)


def test_an_estimate_takes_the_mean_of_a_rate_that_varies_and_says_so() -> None:
    swinging = estimate(load_scenario("diurnal"))
    steady = estimate(load_scenario("diurnal", overrides=["workload.arrivals={kind: poisson, rate: 8}"]))
    assert swinging.value("e2e.mean") == pytest.approx(steady.value("e2e.mean"), rel=0.02)
    assert any("varies up to 14 requests/s: this is the steady state at its mean, 8" in w for w in swinging.warnings)
    assert not any("varies" in warning for warning in steady.warnings)
    beyond = estimate(load_scenario("diurnal", overrides=["workload.arrivals={kind: bursty, base_rate: 5, "
                      "burst_rate: 500, base_duration: 1h, burst_duration: 10s}"]))  # fmt: skip
    assert any("queues grow, which the means do not show" in warning for warning in beyond.warnings)


CALM = [
    "workload.num_sessions=1500", "workload.think_time={kind: exponential, mean: 2s}",
    "workload.turns={kind: uniform, low: 3, high: 6}",
]  # fmt: skip


def test_the_estimate_of_sessions_is_near_the_simulation() -> None:
    """Where the KV pool holds all sessions, as the estimate assumes; start and end of the run are not steady."""
    scenario = load_scenario("chat", overrides=CALM)
    answer, run = estimate(scenario), simulate(scenario)
    assert run.value("prefix_cache.hit_rate") == pytest.approx(answer.value("prefix_cache.hit_rate"), abs=0.005)
    for path in ("ttft.mean", "tpot.mean", "e2e.mean", "throughput.requests_per_s"):
        assert answer.value(path) == pytest.approx(run.value(path), rel=0.1)
    assert any("turns are taken to find all that was said before" in warning for warning in answer.warnings)


def test_the_estimate_of_retrieval_is_near_the_simulation() -> None:
    scenario = load_scenario("rag")
    answer, run = estimate(scenario), simulate(scenario)
    for path in ("ttft.mean", "tpot.mean", "e2e.mean", "prefix_cache.hit_rate"):
        assert answer.value(path) == pytest.approx(run.value(path), rel=0.1)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["estimate", "agents"], "an estimate knows no sessions in a closed loop; use simulate for this workload"),
        (["simulate", "rag", "--set", "workload.documents=50", "--set", "workload.corpus_documents=20"],
         "documents (50) must be at most corpus_documents (20)"),
        (["simulate", "chat", "--set", "workload.arrivals={kind: curve, points: [[0, 2, 3]]}"],
         "workload.arrivals.points.0: expected at most 2 items, got 3"),
        (["simulate", "chat", "--set", "workload.arrivals={kind: curve, points: [[0]]}"],
         "workload.arrivals.points.0: item 2 is missing"),
        (["simulate", "chat", "--set", "workload.think_time={kind: fixd, seconds: 3}"], "did you mean 'fixed'?"),
        (["simulate", "diurnal", "--set", "workload.arrivals.amplitude=2"], "expected a number of at most 1, got 2"),
        (["simulate", "chat", "--set", "workload.inputs=3"], "unknown key 'inputs'; did you mean 'input'?"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(command, message, capsys) -> None:
    assert main(command) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert len(output.err.splitlines()) == 1
    assert not output.out


def test_a_runs_requests_can_be_replayed(tmp_path: Path, capsys) -> None:
    """Times, lengths and sessions are those of the run; what turns shared is not in the file, so nothing is cached."""
    sets = [part for item in SMALL["chat"] for part in ("--set", item)]
    assert main(["simulate", "chat", *sets, "-o", str(tmp_path / "run")]) == 0
    trace = str(tmp_path / "run" / "requests.parquet")
    assert main(["simulate", "chat", "--trace", trace, "-o", str(tmp_path / "again")]) == 0
    assert "requests served" in capsys.readouterr().out
    first, again = (
        simulate(load_scenario("chat", overrides=SMALL["chat"])),
        simulate(load_scenario("chat", trace=trace)),
    )
    for path in ("counts.requests", "counts.prompt_tokens", "counts.output_tokens"):
        assert first.value(path) == again.value(path)
    assert again.value("prefix_cache.hit_rate") == 0


def test_a_saved_scenario_gives_the_same_run(tmp_path: Path) -> None:
    curve = "workload.arrivals={kind: curve, points: [[0, 2], [1min, 5]], shape: linear, period: 1h}"
    sets = ["--set", "workload.num_sessions=10", "--set", curve]
    assert main(["simulate", "chat", *sets, "-o", str(tmp_path / "a")]) == 0
    assert main(["simulate", str(tmp_path / "a" / "scenario.yaml"), "-o", str(tmp_path / "b")]) == 0
    for name in ("scenario.yaml", "result.json", "requests.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_sessions_that_end_early_are_mentioned() -> None:
    short = simulate(load_scenario("chat", overrides=[*SMALL["chat"], "workload.max_context=2000"]))
    said = [warning for warning in short.warnings if "sessions ended early" in warning]
    assert len(said) == 1
    assert 0 < int(said[0].split()[0]) < 40
    assert not any("ended early" in w for w in simulate(load_scenario("chat", overrides=SMALL["chat"])).warnings)
