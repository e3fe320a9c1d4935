"""Questions to the simulator as plain text, so that equal ones are asked once, and the processes that answer them."""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from perfsim.errors import InfeasibleError, InputError
from validation.compare import facts
from validation.compare.bands import Bands, bands_of

if TYPE_CHECKING:
    from perfsim.spec.scenario import Scenario

WORKERS = 2
_FOLDER = re.compile(r"/\S*/")  # of a temporary trace, whose name is another one in every run
INLINE = 3  # fewer questions than this are not worth starting processes for


@dataclass(frozen=True, slots=True)
class Ask:
    """One scenario: the JSON of a scenario file's content, and the weight formats that replace the model's own.

    `formats` are (key of ModelArch, format); `requests` asks for every request's times beside the summary.
    """

    content: str
    formats: tuple[tuple[str, str], ...] = ()
    requests: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """`metrics` of the result (`Result.metrics`), its bands, and the columns of its requests, in order of sending.

    `refused` says why there is none.
    """

    metrics: dict[str, Any]
    timeline: dict[str, Any]
    bands: Bands
    requests: dict[str, NDArray[np.float64]]
    refused: str | None = None


def ask(content: Mapping[str, Any], *, formats: Mapping[str, str] | None = None, requests: bool = False) -> Ask:
    """A question about the scenario file `content`."""
    return Ask(json.dumps(content, sort_keys=True), tuple(sorted((formats or {}).items())), requests)


def scenario_of(question: Ask) -> Scenario:
    """The resolved scenario; InputError or InfeasibleError when it is none."""
    from perfsim.spec.load import Draft

    content = json.loads(question.content)
    node = _node(content["hardware"])
    calibration = _calibration(node.accelerator.name, content["engine"])
    content |= {"model": _model(content["model"], question.formats), "hardware": node, "calibration": calibration}
    for group in content.get("deployment", {}).get("groups", ()):
        group["calibration"] = calibration
    return Draft(content, source="scenario of a measured run").resolve()


# Descriptors are read from their files once per process: there are thousands of scenarios, and few of these.
@lru_cache(maxsize=64)
def _model(name: str, formats: tuple[tuple[str, str], ...]) -> Any:
    found = facts.arch(name)
    return found.model_copy(update=dict(formats)) if formats else found


@lru_cache(maxsize=64)
def _node(name: str) -> Any:
    from perfsim.spec import catalog

    return catalog.node(name)


@lru_cache(maxsize=64)
def _calibration(accelerator: str, engine: str) -> Any:
    from perfsim.spec.load import find_calibration

    return find_calibration(accelerator=accelerator, engine=engine)


def answer(question: Ask) -> Answer:
    """Simulate the scenario; a refusal of perfsim becomes a reason."""
    from perfsim.run import simulate

    try:
        scenario = scenario_of(question)
        if not question.requests:
            result = simulate(scenario)
            return Answer(result.metrics, result.timeline, bands_of(scenario, result), {})
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "requests.parquet"
            result = simulate(scenario, requests_path=path)
            return Answer(result.metrics, result.timeline, bands_of(scenario, result), _requests(path))
    except InfeasibleError as error:
        return Answer({}, {}, Bands({}), {}, refused=f"infeasible: {error.binding}")
    except InputError as error:
        return Answer({}, {}, Bands({}), {}, refused=f"not modelled: {_FOLDER.sub('', str(error))}")


def answers(questions: Sequence[Ask], *, workers: int = WORKERS) -> dict[Ask, Answer]:
    """All answers; equal questions are asked once. Progress goes to stderr."""
    distinct = list(dict.fromkeys(questions))
    progress = Progress(len(distinct))
    if len(distinct) < INLINE or workers < 2:
        found = {}
        for question in distinct:
            found[question] = answer(question)
            progress.step()
        return found
    found = {}
    with ProcessPoolExecutor(max_workers=workers, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(answer, question): question for question in distinct}
        for done in as_completed(waiting):
            found[waiting[done]] = done.result()
            progress.step()
    return {question: found[question] for question in distinct}


class Progress:
    """A line on stderr every few seconds."""

    def __init__(self, total: int, *, what: str = "scenarios", every: float = 5.0) -> None:
        self._total, self._what, self._every = total, what, every
        self._done = 0
        self._last = time.monotonic()

    def step(self, count: int = 1) -> None:
        """`count` more are done."""
        self._done += count
        now = time.monotonic()
        if now - self._last >= self._every or (self._done == self._total and self._total > INLINE):
            self._last = now
            print(f"{self._done}/{self._total} {self._what}", file=sys.stderr, flush=True)


def _requests(path: Path) -> dict[str, NDArray[np.float64]]:
    import pyarrow.parquet as pq

    columns = ("request_index", "arrival_s", "queued_s", "scheduled_s", "first_token_s", "finish_s", "output_tokens",
               "ttft_s", "engine_ttft_s", "tpot_s", "e2e_s")  # fmt: skip
    table = pq.read_table(path, columns=list(columns)).sort_by("request_index")
    found = {name: np.asarray(table[name].cast("float64").fill_null(float("nan")).to_numpy()) for name in columns}
    found["engine_e2e_s"] = found["finish_s"] - found["queued_s"]
    return found
