"""How fast the simulator is: requests per second inside one process, and seen from outside.

The workload is that of published comparisons of serving simulators: lognormal prompts of mean 999 and outputs of mean
199 tokens, Poisson arrivals at about 70% of saturation, Llama-2-7B on one A100 80GB. "Outside" is the difference
between two whole processes, so that start-up and imports cancel, in processor time, which others on the machine disturb
less than the clock on the wall. `--cluster` serves a million requests, whose prompts begin with one of 200 shared
prefixes, with 16 such replicas behind a prefix-aware router, and a sixteenth of this traffic with one. Reports only;
nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from perfsim.run import estimate, simulate
from perfsim.spec.load import load_scenario

SETUP = ("--model", "llama-2-7b-hf", "--hardware", "a100-80gb-sxm")
SEED = 20261123


def saturation() -> float:
    """Requests/s that the replica sustains for these lengths, from the closed form."""
    lengths = "{kind: lognormal, mean: %d, sigma: 0.6, max: %d}"
    workload = (
        "{kind: synthetic, num_requests: 100000, arrivals: {kind: poisson, rate: 1}, "
        f"prompt: {lengths % (999, 3000)}, output: {lengths % (199, 1000)}}}"
    )
    scenario = load_scenario(None, model=SETUP[1], hardware=SETUP[3], overrides=[f"workload={workload}"])
    return float(estimate(scenario).metrics["throughput"]["max_requests_per_s"])


def write_trace(path: Path, count: int, rate: float) -> None:
    """A CSV of `count` requests; chunks keep memory small."""
    rng = np.random.default_rng(SEED)
    at = 0.0
    with path.open("w") as file:
        file.write("arrival_s,prompt_tokens,output_tokens\n")
        for start in range(0, count, 1 << 18):
            size = min(1 << 18, count - start)
            arrivals = at + np.cumsum(rng.exponential(1 / rate, size))
            prompts = np.clip(rng.lognormal(np.log(999) - 0.18, 0.6, size).round(), 1, 3000).astype(int)
            outputs = np.clip(rng.lognormal(np.log(199) - 0.18, 0.6, size).round(), 1, 1000).astype(int)
            at = float(arrivals[-1])
            rows = zip(arrivals.tolist(), prompts.tolist(), outputs.tolist(), strict=True)
            file.writelines(f"{a:.6f},{p},{o}\n" for a, p, o in rows)


def outside(path: Path) -> tuple[float, dict[str, float], float]:
    """(processor seconds of a whole process, its `simulation` figures, peak memory in MB)."""
    flags = ("--trace", str(path), "--no-bands", "--format", "json")
    command = [sys.executable, "-m", "perfsim", "simulate", *SETUP, *flags]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    peak = after.ru_maxrss / 1024
    return seconds, json.loads(done.stdout)["simulation"], peak


def cluster(rate: float, *, count: int, replicas: int) -> None:
    """Requests/s and SimPy events of a cluster, beside one replica under a `replicas`-th of the load."""
    for number in (1, replicas):
        requests = count * number // replicas
        workload = (
            f"{{kind: synthetic, num_requests: {requests}, arrivals: {{kind: poisson, rate: {rate * number}}}, "
            "prompt: {kind: lognormal, mean: 999, sigma: 0.6, max: 3000}, "
            "output: {kind: lognormal, mean: 199, sigma: 0.6, max: 1000}, "
            "shared_prefix: {num_prefixes: 200, tokens: 512, order: random}}"
        )
        deployment = f"{{router: {{kind: prefix_aware}}, groups: [{{name: r, count: {number}}}]}}"
        scenario = load_scenario(
            None, model=SETUP[1], hardware=SETUP[3], overrides=[f"workload={workload}", f"deployment={deployment}"]
        )
        began = time.perf_counter()
        result = simulate(scenario)
        wall = time.perf_counter() - began
        events = result.metrics.get("service", {}).get("events", 0)
        print(
            f"{requests:>10,} requests, {number:>2} replicas: {wall:6.1f} s = {requests / wall:,.0f} requests/s; "
            f"{events / requests:.2f} SimPy events and {result.simulation['segments'] / requests:.2f} segments per "
            f"request; prefix hits {result.metrics['prefix_cache']['hit_rate']:.1%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="runs of each size; medians are reported")
    parser.add_argument("--huge", type=int, default=0, metavar="N", help="also one run of N requests (10000000)")
    parser.add_argument("--cluster", action="store_true", help="16 replicas behind a prefix-aware router instead")
    parser.add_argument("--requests", type=int, default=1_000_000, metavar="N", help="with --cluster: how many")
    options = parser.parse_args()
    rate = 0.7 * saturation()
    print(f"Llama-2-7B on one A100 80GB, Poisson at {rate:.2f} requests/s (70% of saturation) per replica\n")
    if options.cluster:
        cluster(rate, count=options.requests, replicas=16)
        return
    with tempfile.TemporaryDirectory() as folder:
        busy = {}
        for count in (10_000, 110_000):
            path = Path(folder) / f"{count}.csv"
            write_trace(path, count, rate)
            runs = [outside(path) for _ in range(options.runs)]
            busy[count] = float(np.median([seconds for seconds, _, _ in runs]))
            inside = float(np.median([figures["wall_s"] for _, figures, _ in runs]))
            figures = runs[0][1]
            print(
                f"{count:>10,} requests: {inside:6.2f} s simulating = {count / inside:,.0f} requests/s; "
                f"{figures['steps']:,} steps in {figures['segments']:,} segments; processor {busy[count]:.2f} s"
            )
        print(f"{'outside':>10}: {100_000 / (busy[110_000] - busy[10_000]):,.0f} requests/s of processor time")
        if options.huge:
            path = Path(folder) / "huge.csv"
            write_trace(path, options.huge, rate)
            _, figures, peak = outside(path)
            print(
                f"{options.huge:>10,} requests: {figures['wall_s']:6.1f} s simulating = "
                f"{options.huge / figures['wall_s']:,.0f} requests/s; peak memory {peak:,.0f} MB"
            )


if __name__ == "__main__":
    main()
