"""What others published, beside what perfsim misses on the rows of the same study that are at hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from perfsim.spec.yaml import load_yaml
from validation.report.markdown import MISSING, table
from validation.report.store import Results

FILE = Path(__file__).with_name("peers.yaml")
OURS_ARE = {"fitted": "fitted to these rows", "kept out": "overloaded, no fit has seen them",
            "leave one out": "each group predicted by a fit without it"}  # fmt: skip
OURS = {"e2e": "e2e_mean_ms", "ttft": "ttft_mean_ms", "itl": "tpot_derived_ms"}


def render(isim: Results | None, left_out: Results | None) -> Iterator[str]:
    """Lines of the section; `isim` are the results by stage, `left_out` those with each model left out."""
    content = load_yaml(FILE)
    rows = [(entry["who"], entry["on"], *(_pair(entry[key]) for key in OURS), entry["source"])
            for entry in content["runs"]]  # fmt: skip
    ours = []
    if left_out is not None:
        metrics = left_out["left_out"]["whole runs"]
        ours.append(("**perfsim**, each model predicted by coefficients fitted without it", metrics))
    if isim is not None:
        for role, metrics in isim["subsets"]["whole runs"].items():
            ours.append((f"**perfsim**, {OURS_ARE[role]}", metrics))
    for who, metrics in ours:
        count = max((found["n"] for found in metrics.values()), default=0)
        cells = [_own(metrics.get(name)) for name in OURS.values()]
        rows.append((who, f"{count} whole runs of vLLM on H100", *cells, "this report"))
    yield "Percent, median / mean over runs. The studies' other runs are not at hand here, so rows are not the same."
    yield "Our figure under ITL is the mean time per token, (E2E - TTFT) / (output - 1)."
    yield ""
    yield from table(("simulator", "runs", "E2E mean", "TTFT mean", "ITL mean", "source"), rows, left=2)
    yield ""
    for entry in content["runs"]:
        if "note" in entry:
            yield f"- {entry['who']}: {entry['note']}."
    for entry in content["claims"]:
        yield f"- {entry['who']}: {entry['claim']} ({entry['checked']}; {entry['source']})."
    yield ""


def prefills() -> dict[str, Any]:
    """What peers predict for single long prompts."""
    return dict(load_yaml(FILE)["prefills"])


def _pair(found: dict[str, float]) -> str:
    return f"{found['median']:,g} / {found['mean']:,g}"


def _own(found: dict[str, Any] | None) -> str:
    return MISSING if found is None else f"{100 * found['mape_median']:.1f} / {100 * found['mape_mean']:.1f}"
