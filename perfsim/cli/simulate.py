"""`perfsim simulate`: replay the traffic of a scenario step by step."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perfsim.cli.common import (
    BandsOption,
    Format,
    FormatOption,
    SamplesOption,
    ScenarioFlags,
    check_bands,
    console,
    print_json,
    takes_scenario,
    with_report,
)

if TYPE_CHECKING:
    from perfsim.cli.run_folder import RunFolder
    from perfsim.metrics.result import Result
    from perfsim.spec.scenario import Scenario


@takes_scenario
def simulate(
    flags: ScenarioFlags,
    output: FormatOption = Format.table,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            show_default=False,
            help="Also write scenario.yaml, result.json, requests.parquet, trace.pftrace (for ui.perfetto.dev), "
            "report.html and timing.json there.",
        ),
    ] = None,
    stepwise: Annotated[
        bool, typer.Option("--stepwise", help="Compute every engine step by itself: slow, same answer; for checking.")
    ] = False,
    samples: SamplesOption = None,
    bands: BandsOption = True,
) -> None:
    """Simulate a scenario request by request and report latency, throughput, cache, cost and energy."""
    from perfsim.cli.run_folder import RunFolder

    check_bands(bands=bands, samples=samples)
    resolved, report = flags.resolve_command()
    drawn = samples or resolved.samples
    resolved = resolved.model_copy(update={"samples": None})  # bands are made after the run that is timed
    folder = RunFolder(directory) if directory is not None else None
    result, wall_s = _run(resolved, folder, stepwise=stepwise, drawn=drawn, bands=bands)
    if bands:
        from perfsim.run import with_samples

        resolved = with_samples(resolved, drawn)
    result = with_report(result, report)
    if folder is not None:
        folder.write(resolved, result, wall_s=wall_s)
    print_result(result, output=output, wall_s=wall_s)
    if folder is not None and output is Format.table:
        typer.echo(f"\nWritten to {folder.path}: {', '.join(folder.NAMES)}")


def _run(
    resolved: Scenario, folder: RunFolder | None, *, stepwise: bool, drawn: int | None, bands: bool
) -> tuple[Result, float]:
    """(the result, with its bands where they are wanted; seconds that the simulation itself took)."""
    from perfsim.cli.progress import progress_bar
    from perfsim.report.trace_file import TraceFile  # heavy, as the next: not before the input is known to be good
    from perfsim.run import quantify
    from perfsim.run import simulate as run_simulate

    if folder is not None or resolved.workload.kind == "trace":
        import pyarrow.csv
        import pyarrow.parquet  # noqa: F401  # imported here, so that the simulation's wall time does not include it

    with progress_bar(resolved) as progress, ExitStack() as stack:
        trace = None if folder is None else stack.enter_context(TraceFile(folder.trace_path))
        began = perf_counter()
        result = run_simulate(resolved, progress=progress, stepwise=stepwise, trace=trace,
                              requests_path=None if folder is None else folder.requests_path)  # fmt: skip
        wall_s = perf_counter() - began
        if bands:
            result = quantify(result, resolved, samples=drawn)
    if trace is not None and trace.note is not None:
        print(f"trace.pftrace is not complete: {trace.note}", file=sys.stderr)
    return result, wall_s


def print_result(result: Result, *, output: Format, wall_s: float | None = None) -> None:
    """A result on standard output; `wall_s` joins `simulation`, where it would break the bytes of a file."""
    if output is Format.json:
        content: dict[str, Any] = result.to_dict()
        if wall_s is not None:
            content["simulation"]["wall_s"] = wall_s
        print_json(content)
    elif output is Format.csv:
        from perfsim.report.tables import to_csv

        typer.echo(to_csv(result), nl=False)
        if wall_s is not None:
            typer.echo(f"simulation.wall_s,,{wall_s},s")
    else:
        from perfsim.report.tables import summary_table

        console().print(summary_table(result))
        if wall_s is not None:
            requests = result.simulation["requests"]
            print(f"Simulated {requests:,} requests in {wall_s:.2f} s ({requests / wall_s:,.0f}/s)", file=sys.stderr)
