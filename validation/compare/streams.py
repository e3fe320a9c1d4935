"""Elementwise kernels of layer tables as those were timed: unfused and eager, or repeated in the L2 cache.

`streams.yaml` holds two conditions per table and operator, a launch and the share of the time that HBM would need for
the bytes that `layers.numbers` counts. `python -m validation.compare.streams --data DIR` fits and writes them, pooled
over all GPUs and models of a table. They describe those benchmarks; the cost model has none of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from perfsim.calibrate.fit import SOFT
from perfsim.spec.model import ACTIVATION_BYTES, ModelArch
from perfsim.spec.yaml import load_yaml
from validation.compare import facts
from validation.compare.lowered import Floats

FILE = Path(__file__).with_name("streams.yaml")
HEADER = """\
# Conditions of the layer tables' elementwise kernels; do not edit: `python -m validation.compare.streams --data DIR`
# writes this file. Per table and operator: launch in seconds, share of the time that HBM would need for its bytes
# (below 1: they stay in the L2 cache between repeats; above: several unfused kernels), rows, median error.
# sources: llmservingsim_* casys-kaist/LLMServingSim@5daddb2 (MIT), vidur_linear_ops microsoft/vidur@7d47513 (MIT).
"""
LOGITS = 4.0  # bytes of a logit in the sampler


@cache
def conditions() -> dict[str, Any]:
    """The file, by table and operator; empty before the first fit."""
    return load_yaml(FILE) if FILE.is_file() else {}


def bytes_moved(model: ModelArch, name: str, tokens: Floats, numbers: tuple[float, float] | None) -> Floats | None:
    """Bytes that an operator reads and writes for `tokens` tokens, the logits of as many sequences in a sampler."""
    if name == "sampler":
        return tokens * model.vocab_size * LOGITS
    return None if numbers is None else tokens * sum(numbers) * ACTIVATION_BYTES[model.dtype]


def stream_seconds(table: str, name: str, moved: Floats | None, accelerator: str) -> Floats | None:
    """Seconds as the table's benchmark would have timed them; None where nothing was fitted."""
    found: Mapping[str, float] | None = conditions().get(table, {}).get(name)
    if found is None or moved is None:
        return None
    return found["launch"] + found["share"] * moved / facts.accelerator(accelerator).memory.read_bandwidth


def fitted(ideal: Floats, measured: Floats) -> tuple[float, float, float]:
    """(launch, share, median absolute error) of measured = launch + share x ideal, by soft-L1 relative errors."""
    from scipy.optimize import least_squares

    def errors(logs: Floats) -> Floats:
        launch, share = np.exp(logs)
        result: Floats = np.log(launch + share * ideal) - np.log(measured)
        return result

    found = least_squares(errors, np.log([5e-6, 1.0]), loss="soft_l1", f_scale=SOFT)
    launch, share = (float(value) for value in np.exp(found.x))
    return launch, share, float(np.median(np.abs(np.expm1(errors(found.x)))))


def main(arguments: list[str] | None = None) -> int:
    """Fit the conditions of the three tables and write the file."""
    from validation.compare.layers import observed_streams

    parser = argparse.ArgumentParser(prog="python -m validation.compare.streams", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the layer tables")
    lines = [HEADER.rstrip("\n")]
    for table, operators in observed_streams(parser.parse_args(arguments).data).items():
        lines.append(f"{table}:")
        for name, (ideal, measured) in sorted(operators.items()):
            launch, share, error = fitted(ideal, measured)
            lines.append(
                f"  {name}: {{launch: {launch:.4g}, share: {share:.4g}, rows: {len(ideal)}, median: {error:.3f}}}"
            )
    FILE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
