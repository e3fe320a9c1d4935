"""The section on long prefills: predictions, bounds, and measured points near them."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from perfsim.cost.device import peak_flops
from perfsim.spec import catalog
from perfsim.spec.engine_defaults import batch_defaults
from perfsim.spec.load import find_calibration
from validation.ops.predict import compare
from validation.ops.slice import slice_rows
from validation.report import long_prefill, peers
from validation.report.long_prefill import Prefill
from validation.report.markdown import percent, seconds, table
from validation.report.plots import Series, figure, residuals, scatter
from validation.report.store import Results, provenance, stamped

LONGEST = 3  # contexts of kernels that are listed per device


def run(paths: list[Path], figures: Path) -> Results:
    """Predict the prompts of `long_prefill.yaml`, measured whole prefills, and the longest measured attention."""
    measured = list(_measured(paths[0]))
    results = {
        "predictions": [asdict(one) for one in long_prefill.predictions()], "measured": measured,
        "attention": list(_attention()), "others": list(_beside_others()), "rows": len(measured),
    }  # fmt: skip
    series: dict[str, list[dict[str, Any]]] = {}
    for one in measured:
        series.setdefault(f"{one['device']}, tp {one['tp']}", []).append(one)
    panels = [
        scatter("Llama-2-70B prefill", "s", [_points(name, found) for name, found in sorted(series.items())]),
        residuals("Llama-2-70B prefill", "prompt (tokens)",
                  [_errors(name, found) for name, found in sorted(series.items())]),
    ]  # fmt: skip
    text = figure(panels, label="Whole prefills of Llama-2-70B")
    (figures / "long-prefills.svg").write_text(text, encoding="utf-8")
    return stamped(results, paths)


def _points(name: str, found: list[dict[str, Any]]) -> Series:
    return Series(name, np.array([one["measured"] for one in found]), np.array([one["predicted"] for one in found]))


def _errors(name: str, found: list[dict[str, Any]]) -> Series:
    error = np.array([one["predicted"] / one["measured"] - 1.0 for one in found])
    return Series(name, np.array([float(one["tokens"]) for one in found]), error)


def _measured(path: Path) -> Iterator[dict[str, Any]]:
    """Whole prefills of one prompt; the engine is not named, so vLLM's profile and kernels stand in for it."""
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            node = catalog.node(row["device"])
            calibration = find_calibration(accelerator=node.accelerator.name, engine="vllm")
            chunk = max(batch_defaults(node.accelerator)[0], int(row["tokens"]))
            said = long_prefill.prefill(
                catalog.model(row["model"]), node, tokens=int(row["tokens"]), tp=int(row["tp"]), chunk=chunk,
                calibration=calibration,
            )  # fmt: skip
            yield {"model": row["model"], "device": row["device"], "tp": said.tp, "tokens": said.tokens,
                   "measured": float(row["seconds"]), "predicted": said.seconds, "bound": said.bound,
                   "mfu": said.mfu * said.seconds / float(row["seconds"])}  # fmt: skip


def _beside_others() -> Iterator[dict[str, Any]]:
    """Our prediction of the prompts that peers were asked for."""
    asked = peers.prefills()
    node = catalog.node(asked["device"])
    calibration = find_calibration(accelerator=node.accelerator.name, engine="vllm")
    for tokens in asked["tokens"]:
        said = long_prefill.prefill(
            catalog.model(asked["model"]), node, tokens=tokens, tp=asked["tp"], chunk=asked["chunk"],
            calibration=calibration,
        )  # fmt: skip
        yield {"tokens": tokens, "bound": said.bound, "seconds": said.seconds}


def _others(ours: list[dict[str, Any]]) -> Iterator[str]:
    asked = peers.prefills()
    yield f"One prompt of {asked['model']} on one {asked['device']}, in steps of {asked['chunk']:,} tokens, in"
    yield f"milliseconds. {asked['source']}"
    yield ""
    rows = [("our bound", *(f"{1e3 * one['bound']:,.1f}" for one in ours)),
            ("perfsim", *(f"{1e3 * one['seconds']:,.1f}" for one in ours))]  # fmt: skip
    rows += [(who, *(f"{value:,g}" for value in values)) for who, values in asked["predicted_ms"].items()]
    yield from table(("", *(f"{one['tokens']:,} tokens" for one in ours)), rows)
    yield ""


def _attention() -> Iterator[dict[str, Any]]:
    """The committed prefill-attention rows with the most FLOPs of every device, 16-bit, by any backend's kernels."""
    for rows in slice_rows():
        found = compare(rows) if rows.kind == "prefill" and rows.format in ("bf16", "mla-bf16") else None
        if found is None:
            continue
        columns, chip = found.rows.columns, catalog.accelerator(rows.device)
        full = columns["window"] == 0
        pairs = columns["new"] * (columns["new"] + 1) / 2 + columns["new"] * (columns["context"] - columns["new"])
        flops = np.where(full, columns["sequences"] * pairs * columns["pair"], 0.0)
        share = flops / (found.rows.seconds * peak_flops(chip, "bf16"))
        for at in np.argsort(-columns["context"] * full, kind="stable")[:LONGEST]:
            yield {
                "device": rows.device, "backend": f"{rows.backend} {rows.version}", "format": rows.format,
                "heads": float(columns["heads"][at]), "dim": float(columns["dim"][at]),
                "sequences": float(columns["sequences"][at]), "context": float(columns["context"][at]),
                "measured": float(found.rows.seconds[at]), "error": float(found.errors[at]), "share": float(share[at]),
                "held_out": bool(found.held_out[at]),
            }  # fmt: skip


def render(results: Results) -> Iterator[str]:
    """Lines of the section in Markdown."""
    yield "One prompt alone, computed in steps of vLLM's token budget (A100 2,048, H100 8,192, B200 16,384 tokens) on"
    yield "the fewest GPUs that hold the model and K/V of a million tokens. The bound is that of the whole prompt in"
    yield "one step: the longest of matrix FLOPs over dense peak, bytes over HBM bandwidth and bytes over links, as if"
    yield "all overlapped. MFU is matrix FLOPs over the dense 16-bit peak. Lengths beyond a model's own context keep"
    yield "its shapes. DeepSeek-V3 fits one node of eight B200 only."
    yield ""
    yield from long_prefill.rows([Prefill(**one) for one in results["predictions"]])
    yield ""
    yield "### What others predict"
    yield ""
    yield from _others(results["others"])
    yield "### Measured near them: whole prefills"
    yield ""
    yield f"{provenance(results)} No public table at hand holds a whole prefill beyond 8,192 tokens. These are"
    yield "Llama-2-70B's of Splitwise (Mutinifni/splitwise-sim@8f99e7d, MIT; engine of 2023, not named), medians of"
    yield "repeats. Short prompts there wait for the host; none was fitted."
    yield ""
    yield from table(("device", "tp", "prompt", "measured", "predicted", "error", "measured / bound", "measured MFU"), [
        (one["device"], str(one["tp"]), f"{one['tokens']:,}", seconds(one["measured"]), seconds(one["predicted"]),
         percent(one["predicted"] / one["measured"] - 1, sign=True), f"{one['measured'] / one['bound']:.2f}",
         f"{one['mfu']:.0%}")
        for one in results["measured"]
    ])  # fmt: skip
    yield ""
    yield "![Whole prefills of Llama-2-70B](figures/long-prefills.svg)"
    yield ""
    yield "### Measured near them: the longest attention kernels"
    yield ""
    yield f"The {LONGEST} longest committed rows of each device and kernel library; nothing beyond 32,768 tokens was"
    yield "measured, so longer ones are extrapolated by the form of the curve."
    yield ""
    yield from table(("device", "kernels", "format", "heads x dim", "sequences", "context", "measured", "error",
                      "share of peak, measured", "fitted"), [
        (one["device"], one["backend"], one["format"], f"{one['heads']:g} x {one['dim']:g}", f"{one['sequences']:,g}",
         f"{one['context']:,g}", seconds(one["measured"]), percent(one["error"], sign=True), f"{one['share']:.0%}",
         "no" if one["held_out"] else "yes")
        for one in sorted(results["attention"], key=lambda one: (one["format"], one["device"], one["backend"]))
    ], left=4)  # fmt: skip
    yield ""
