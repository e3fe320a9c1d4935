"""The folder that one run leaves behind; everything in it but `timing.json` has the same bytes on every rerun."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from perfsim.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from perfsim.metrics.result import Result
    from perfsim.spec.scenario import Scenario


class RunFolder:
    """Writes a run's files into a directory, which is made when missing; other files in it are left alone.

    The directory is checked before the simulation starts, so that an hour's work is not lost to a typing error.
    Raises InputError when it cannot be written.
    """

    NAMES: ClassVar[tuple[str, ...]] = (
        "scenario.yaml", "result.json", "requests.parquet", "trace.pftrace", "report.html", "timing.json",
    )  # fmt: skip

    def __init__(self, path: Path) -> None:
        self.path = path
        with _as_input_error(path):
            path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise InputError(f"--output: '{path}' is not writable")
        for name in self.NAMES:
            if (path / name).is_dir():
                raise InputError(f"--output: '{path / name}' is a directory; expected a file or nothing there")

    @property
    def requests_path(self) -> Path:
        """Where the simulator writes one row per request while it runs."""
        return self.path / "requests.parquet"

    @property
    def trace_path(self) -> Path:
        """Where the timeline for the Perfetto viewer goes."""
        return self.path / "trace.pftrace"

    def write(self, scenario: Scenario, result: Result, *, wall_s: float) -> None:
        """Write everything but the requests and the trace."""
        from perfsim.metrics.result import canonical_json
        from perfsim.report.html import write_report
        from perfsim.spec.save import scenario_yaml

        timing = {"wall_s": wall_s, "requests_per_s": result.simulation["requests"] / wall_s}
        with _as_input_error(self.path):
            (self.path / "scenario.yaml").write_text(scenario_yaml(scenario, directory=self.path), encoding="utf-8")
            (self.path / "result.json").write_text(result.to_json(), encoding="utf-8")
            write_report(result, self.path / "report.html")
            (self.path / "timing.json").write_text(canonical_json(timing), encoding="utf-8")


@contextmanager
def _as_input_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"--output: cannot write to '{path}': {error.strerror or error}") from None
