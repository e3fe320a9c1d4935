"""The sections of the report: what each is made from, how it is run and how it is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from validation.collectives.rows import MEASURED as SLICES
from validation.ops.slice import path_of
from validation.report import exchanges, kernel_tables, kernels, left_out, prefills, served
from validation.report.split import split
from validation.report.store import MEASURED, Results

SILICON = "aic_silicon_sample"
SILICON_SLICE = "silicon-slice.parquet"


@dataclass(frozen=True, slots=True)
class Section:
    """One part of the report.

    `tables` are below the data directory, `committed` lie in `validation/measured`. `run(paths, figures)` computes the
    results of the tables at `paths` and writes figures; `show` gives their lines in Markdown.
    """

    name: str
    tables: tuple[str, ...]
    committed: tuple[Path, ...]
    run: Callable[[list[Path], Path], Results]
    show: Callable[[Results], Iterable[str]]

    def inputs(self, data: Path | None) -> list[Path] | None:
        """The tables to run on: those of `data`, else the committed ones; None where neither is at hand."""
        if data is not None and self.tables:
            found = [data / name for name in self.tables]
            if all(path.is_file() for path in found):
                return found
        return list(self.committed) if self.committed or not self.tables else None


def sections() -> Iterator[Section]:
    """All of them, in the order of the report."""
    for stem, listed in split().tables.items():
        committed = (MEASURED / listed.run,) if listed.run else ()
        tables = tuple(f"{listed.folder}/{name}.parquet" for name in (stem, listed.twins) if name)
        yield Section(
            listed.section, tables, committed,
            partial(_run_served, stem), partial(served.render, stem),
        )  # fmt: skip
        if listed.section == "isim":
            yield Section("left-out", tuple(f"serving/{name}.parquet" for name in left_out.TABLES), (),
                          lambda paths, _: left_out.run(paths[0].parents[1]), left_out.render)  # fmt: skip
        if stem == SILICON:
            yield Section("silicon-slice", (), (MEASURED / SILICON_SLICE,), _run_silicon_slice, _show_silicon_slice)
    yield from _kernel_sections()
    yield Section("long-prefills", (), (MEASURED / "prefills.csv", path_of("prefill")), prefills.run, prefills.render)


def _run_served(stem: str, paths: list[Path], figures: Path) -> Results:
    return served.run(stem, paths[0], figures, twins=paths[1] if len(paths) > 1 else None)


def _kernel_sections() -> Iterator[Section]:
    yield Section("operators", tuple(f"ops/{name}.parquet" for name in kernels.TABLES), (),
                  lambda paths, figures: kernels.run_whole(paths[0].parents[1], figures), _titled(
                      "### Fitted operator curves, all rows",
                      lambda found: kernels.render(found, name="operators")))  # fmt: skip
    yield Section("operators-slice", (), tuple(kernels.slices()),
                  lambda _, figures: kernels.run_slice(figures), _titled(
                      "### Fitted operator curves, committed rows",
                      lambda found: kernels.render(found, name="operators-slice")))  # fmt: skip
    yield Section("kernel-tables", tuple(f"ops/{stem}.parquet" for stem in split().kernels), (),
                  lambda paths, _: kernel_tables.run(paths[0].parents[1]), kernel_tables.render)  # fmt: skip
    yield Section("collectives", tuple(f"ops/{name}.parquet" for name in exchanges.TABLES), (),
                  lambda paths, figures: exchanges.run_whole(paths[0].parents[1], figures), _titled(
                      "### Collectives, all rows",
                      lambda found: exchanges.render(found, name="collectives")))  # fmt: skip
    yield Section("collectives-slice", (), tuple(SLICES / name for name in exchanges.SLICES),
                  lambda _, figures: exchanges.run_slice(figures), _titled(
                      "### Collectives, committed rows",
                      lambda found: exchanges.render(found, name="collectives-slice")))  # fmt: skip


def _titled(title: str, show: Callable[[Results], Iterable[str]]) -> Callable[[Results], Iterable[str]]:
    return lambda results: [title, "", *show(results)]


def _run_silicon_slice(paths: list[Path], figures: Path) -> Results:
    return served.run(SILICON, paths[0], figures, section="silicon-slice")


def _show_silicon_slice(results: Results) -> Iterator[str]:
    return served.render(SILICON, results, section="silicon-slice", note="A few committed rows of every group.")
