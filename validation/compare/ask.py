"""Questions to the simulator as plain text, so that equal ones are asked once, and the processes that answer them."""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from perfsim.errors import InfeasibleError, InputError
from validation.compare import facts, loops
from validation.compare.bands import Bands, bands_of

if TYPE_CHECKING:
    from perfsim.spec.scenario import Scenario

WORKERS = 2
_FOLDER = re.compile(r"/\S*/")  # of a temporary trace, whose name is another one in every run
INLINE = 3  # fewer questions than this are not worth starting processes for
MOST_REQUESTS, MOST_REPLICAS = 10_000_000, 10_000  # of one run: a mistake in a table, not a measurement
BATCH, OVERHEAD = 4000, 500  # requests that one process is asked for at once
Coefficients = tuple[tuple[str, float], ...]  # (field of EngineProfile, value)


@dataclass(frozen=True, slots=True)
class Ask:
    """One scenario: the JSON of a scenario file's content, and the weight formats that replace the model's own.

    `formats` are (key of ModelArch, format); `requests` asks for every request's times beside the summary. `sent` is
    how many requests every client of a closed loop sent, where the scenario has fewer; 0 when it has all of them.
    """

    content: str
    formats: tuple[tuple[str, str | bool], ...] = ()
    requests: bool = False
    sent: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """`metrics` of the result (`Result.metrics`), its bands, and what was asked for besides: `timeline` and requests.

    The columns of `requests` are in order of sending. `refused` says why there is no answer.
    """

    metrics: dict[str, Any]
    timeline: dict[str, Any]
    bands: Bands
    requests: dict[str, NDArray[np.float64]]
    refused: str | None = None


def ask(
    content: Mapping[str, Any], *, formats: Mapping[str, str | bool] | None = None, requests: bool = False,
    sent: int = 0,
) -> Ask:  # fmt: skip
    """A question about the scenario file `content`."""
    return Ask(json.dumps(content, sort_keys=True), tuple(sorted((formats or {}).items())), requests, sent)


def scenario_of(question: Ask) -> Scenario:
    """The resolved scenario; InputError or InfeasibleError when it is none."""
    from perfsim.spec.load import Draft

    content = json.loads(question.content)
    node = _node(content["hardware"])
    calibration = _calibration(node.accelerator.name, content["engine"], content.get("engine_version"))
    content |= {"model": _model(content["model"], question.formats), "hardware": node, "calibration": calibration}
    for group in content.get("deployment", {}).get("groups", ()):
        group["calibration"] = calibration
    return Draft(content, source="scenario of a measured run").resolve()


# Descriptors are read from their files once per process: there are thousands of scenarios, and few of these.
@lru_cache(maxsize=64)
def _model(name: str, formats: tuple[tuple[str, str | bool], ...]) -> Any:
    found = facts.arch(name)
    return found.model_copy(update=dict(formats)) if formats else found


@lru_cache(maxsize=64)
def _node(name: str) -> Any:
    from perfsim.spec import catalog

    return catalog.node(name)


@lru_cache(maxsize=64)
def _calibration(accelerator: str, engine: str, version: str | None) -> Any:
    from perfsim.spec.load import find_calibration

    return find_calibration(accelerator=accelerator, engine=engine, version=version)


def answer(question: Ask, engine: Coefficients = (), *, bands: bool = True) -> Answer:
    """Simulate the scenario; a refusal of perfsim becomes a reason.

    `engine` replaces coefficients of the engine's profile; there are no bands then, whose sizes belong to the packaged
    ones. An error of perfsim itself is a reason as well: it concerns one scenario, and a table has thousands.
    """
    from perfsim.serving.check import BookkeepingError

    too_much = _too_much(json.loads(question.content))
    if too_much is not None:
        return _refused(too_much)
    try:
        scenario = scenario_of(question)
        if engine:
            scenario = _with_engine(scenario, engine)
        return simulated(question, scenario, bands=bands and not engine)
    except InfeasibleError as error:
        if error.binding == "HBM capacity" and _fits_with_another_share(question):
            return _refused("share of memory for weights and KV cache not published: they do not fit the default one")
        return _refused(f"infeasible: {error.binding}")
    except InputError as error:
        return _refused(f"not modelled: {_FOLDER.sub('', str(error))}")
    except (BookkeepingError, ArithmeticError, LookupError, ValueError) as error:
        print(f"{type(error).__name__}: {error} in {question.content}", file=sys.stderr, flush=True)
        return _refused(f"perfsim failed: {type(error).__name__}")


def _too_much(content: Mapping[str, Any]) -> str | None:
    """Why a load or a deployment is larger than any that was measured, so that it would not end; None otherwise."""
    if content["workload"].get("num_requests", 0) > MOST_REQUESTS:
        return f"not simulated: more than {MOST_REQUESTS:,} requests"
    if sum(group["count"] for group in content.get("deployment", {}).get("groups", ())) > MOST_REPLICAS:
        return f"not simulated: more than {MOST_REPLICAS:,} replicas"
    return None


def _fits_with_another_share(question: Ask) -> bool:
    """Whether SGLang's --mem-fraction-static decides: its default leaves so much free that some weights do not fit.

    Then a run that took place was started with another one, on which the size of its KV cache depends.
    """
    from perfsim.run import simulate

    content = json.loads(question.content)
    policies = [content.get("policy", {}), *(group.get("policy", {}) for group in
                                             content.get("deployment", {}).get("groups", ()))]  # fmt: skip
    own = [policy for policy in policies if policy.get("memory_rule") == "sglang"]
    for policy in own:
        policy["gpu_memory_utilization"] = 0.99
    one = {"kind": "fixed", "tokens": 1}
    content["workload"] = {"kind": "synthetic", "num_requests": 1, "prompt": one, "output": one,
                           "arrivals": {"kind": "closed", "concurrency": 1}}  # fmt: skip
    try:
        return bool(own) and simulate(scenario_of(replace(question, content=json.dumps(content)))) is not None
    except (InfeasibleError, InputError):
        return False


def _refused(reason: str) -> Answer:
    return Answer({}, {}, Bands({}), {}, refused=reason)


def simulated(question: Ask, scenario: Scenario, *, bands: bool) -> Answer:
    """What the result of a scenario says about a question; its calibration need not be the packaged one."""
    from perfsim.run import simulate

    if not question.requests and not question.sent:
        result = simulate(scenario)
        if not result.metrics["counts"]["completed"]:
            return _nothing_fits(result.metrics)
        return Answer(result.metrics, {}, bands_of(scenario, result) if bands else Bands({}), {})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "requests.parquet"
        result = simulate(scenario, requests_path=path)
        requests = _requests(path)
    if not len(requests["request_index"]):
        return _nothing_fits(result.metrics)
    found = bands_of(scenario, result) if bands else Bands({})
    if question.requests:
        return Answer(result.metrics, result.timeline, found, requests)
    clients, simulated = _loop(scenario)
    weight = loops.weights(
        requests["request_index"].astype(int), clients=clients, simulated=simulated, measured=question.sent
    )
    return Answer(loops.metrics_of(requests, weight, clients=clients), {}, found, {})


def _nothing_fits(metrics: Mapping[str, Any]) -> Answer:
    return _refused(f"infeasible: no request fits ({', '.join(sorted(metrics['rejected_for']))})")


def _loop(scenario: Scenario) -> tuple[int, int]:
    """(clients, requests of each) of a closed loop."""
    from perfsim.spec.workload import ClosedLoop, SyntheticWorkload

    workload = scenario.workload
    if not isinstance(workload, SyntheticWorkload) or not isinstance(workload.arrivals, ClosedLoop):
        raise InputError("requests per client: the scenario is no closed loop")
    return workload.arrivals.concurrency, workload.num_requests // workload.arrivals.concurrency


def _with_engine(scenario: Scenario, engine: Coefficients) -> Scenario:
    """The scenario with other coefficients of the engine, in every group of replicas."""

    def changed(calibration: Any) -> Any:
        return calibration.model_copy(update={"engine": calibration.engine.model_copy(update=dict(engine))})

    deployment = scenario.deployment
    if deployment is not None:
        groups = tuple(group if group.calibration is None else
                       group.model_copy(update={"calibration": changed(group.calibration)})
                       for group in deployment.groups)  # fmt: skip
        deployment = deployment.model_copy(update={"groups": groups})
    return scenario.model_copy(update={"calibration": changed(scenario.calibration), "deployment": deployment})


def answers(
    questions: Sequence[Ask], *, workers: int = WORKERS, engine: Coefficients = (), bands: bool = True
) -> dict[Ask, Answer]:  # fmt: skip
    """All answers, as `answer`; equal questions are asked once. Progress goes to stderr."""
    distinct = list(dict.fromkeys(questions))
    progress = Progress(len(distinct))
    found = {}
    if len(distinct) < INLINE or workers < 2:
        for question in distinct:
            found[question] = answer(question, engine, bands=bands)
            progress.step()
        return found
    with ProcessPoolExecutor(max_workers=workers, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(_batch, batch, engine, bands=bands): batch for batch in _batches(distinct)}
        for done in as_completed(waiting):
            found |= zip(waiting[done], done.result(), strict=True)
            progress.step(len(waiting[done]))
    return {question: found[question] for question in distinct}


def _batch(questions: Sequence[Ask], engine: Coefficients, *, bands: bool) -> list[Answer]:
    return [answer(question, engine, bands=bands) for question in questions]


def _batches(questions: Sequence[Ask]) -> list[list[Ask]]:
    """Long ones first and alone, so that no process waits for the other at the end; short ones together."""
    batches: list[list[Ask]] = []
    room = 0
    for requests, question in sorted(((_length(question), question) for question in questions),
                                     key=lambda pair: -pair[0]):  # fmt: skip
        if room < requests:
            batches.append([])
            room = BATCH
        batches[-1].append(question)
        room -= requests
    return batches


def _length(question: Ask) -> int:
    """How long a question takes, roughly: its requests; what compiling takes counts as some more."""
    return OVERHEAD + int(json.loads(question.content)["workload"].get("num_requests", BATCH))


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
