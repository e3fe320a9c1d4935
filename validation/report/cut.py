"""The committed slices of measured serving runs: `python -m validation.report.cut --data DIR` cuts them anew."""

from __future__ import annotations

import argparse
import csv
import hashlib
import shutil
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from validation.compare.table import Table, read_table
from validation.report.sections import SILICON, SILICON_SLICE
from validation.report.split import split
from validation.report.store import MEASURED

EACH = 3  # rows of every engine, device, model and mode
GROUP = ("backend", "system", "model_path", "mode")
DEVICES = {"a100-80gb": "a100-80gb-sxm", "h100-80gb": "h100-80gb-sxm"}


def cut(data: Path) -> None:
    """Write all slices to `validation/measured`."""
    for stem, listed in split().tables.items():
        if listed.run:
            # As it is, so that the report says the same with and without the whole tables.
            shutil.copyfile(data / listed.folder / f"{stem}.parquet", MEASURED / listed.run)
    silicon = read_table(data / "serving" / f"{SILICON}.parquet")
    write(silicon.keep(chosen(silicon)), MEASURED / SILICON_SLICE)
    prefills(read_table(data / "serving" / "splitwise_perf_model.parquet"))


def write(table: Table, path: Path) -> None:
    """The rows as Parquet, small."""
    import pyarrow.parquet as pq

    pq.write_table(table.data, path, compression="zstd")


def chosen(table: Table) -> Any:
    """bool[rows]: of every group the EACH trusted rows whose content has the smallest hashes."""
    groups: dict[tuple[str, ...], list[tuple[str, int]]] = {}
    for index, row in enumerate(table.rows()):
        if not row["exact_duplicate"] and (row["same_config_tpot_spread"] or 1.0) <= 2.0 and row["concurrency"]:
            digest = hashlib.sha256(repr(sorted(row.items(), key=lambda item: item[0])).encode()).hexdigest()
            groups.setdefault(tuple(str(row[name]) for name in GROUP), []).append((digest, index))
    mask = np.zeros(len(table), dtype=bool)
    mask[[index for found in groups.values() for _, index in sorted(found)[:EACH]]] = True
    return mask


def prefills(table: Table) -> None:
    """Medians of Splitwise's times of one Llama-2-70B prompt, from 512 tokens."""
    found: dict[tuple[str, int, int], list[float]] = {}
    for row in table.rows():
        whole = row["model"] == "llama2-70b" and row["batch_size"] == 1 and row["prompt_size"] >= 512
        if whole and row["hardware"] in DEVICES:
            key = (DEVICES[row["hardware"]], int(row["tensor_parallel"]), int(row["prompt_size"]))
            found.setdefault(key, []).append(row["prompt_ms"] / 1e3)
    with (MEASURED / "prefills.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("model", "device", "tp", "tokens", "seconds"))
        writer.writerows(("llama-2-70b-hf", *key, f"{median(values):.6g}") for key, values in sorted(found.items()))


def main(arguments: list[str] | None = None) -> int:
    """Cut the slices from the whole tables."""
    parser = argparse.ArgumentParser(prog="python -m validation.report.cut", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with serving/")
    cut(parser.parse_args(arguments).data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
