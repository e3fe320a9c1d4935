"""Progress of a simulation on standard error, and only when a person is watching."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from perfsim.spec.scenario import Scenario

Callback = Callable[[int, float], None]


@contextmanager
def progress_bar(scenario: Scenario) -> Iterator[Callback | None]:
    """A callback (requests sent, simulated seconds) that moves a bar with an ETA; None when stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("requests"),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("simulating", total=expected_requests(scenario))
        yield lambda done, _simulated_s: bar.update(task, completed=done)


def expected_requests(scenario: Scenario) -> int | None:
    """How many requests the workload holds, None when only reading all of it would tell."""
    from perfsim.spec.workload import AgentsWorkload, SessionsWorkload, TraceWorkload

    workload = scenario.workload
    if not isinstance(workload, TraceWorkload):
        return None if isinstance(workload, SessionsWorkload | AgentsWorkload) else workload.num_requests
    from perfsim.spec import catalog

    path = catalog.trace_path(workload.trace)
    if path.suffix.lower() != ".parquet":
        return workload.num_requests
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = int(pq.read_metadata(path).num_rows)
    except (pa.ArrowException, OSError):
        return workload.num_requests  # the reader of the trace says what is wrong with the file
    return min(rows, workload.num_requests or rows)
