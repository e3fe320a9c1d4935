"""From a scenario file and flags to a resolved Scenario: the only place where names become descriptors."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perfsim.errors import InputError, nearest
from perfsim.spec import catalog
from perfsim.spec.calibration import Calibration
from perfsim.spec.calibration_file import load_calibration
from perfsim.spec.cluster import Cluster
from perfsim.spec.deployment import ReplicaGroup
from perfsim.spec.deployment_file import resolve_deployment
from perfsim.spec.engine_defaults import check_parallel, resolve_policy
from perfsim.spec.hardware import Node
from perfsim.spec.model import ModelArch
from perfsim.spec.policy import ParallelPlan
from perfsim.spec.problems import shorten, validated
from perfsim.spec.scenario import Scenario
from perfsim.spec.scenario_file import ScenarioFile
from perfsim.spec.workload import TraceWorkload, Workload
from perfsim.spec.yaml import load_yaml, parse_yaml_value

if TYPE_CHECKING:
    from perfsim.spec.command_line import EngineCommand

DEFAULT_SCENARIO = "default"
CALIBRATION = "first-guess"
_KEY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*\Z")


class Draft:
    """The content of a scenario file while flags are laid over it; remembers which flag wrote what, for messages."""

    def __init__(self, content: Mapping[str, Any], *, source: str, directory: Path | None = None) -> None:
        self._content: dict[str, Any] = dict(content)
        self._source = source
        self._directory = directory
        self._origins: dict[str, str] = {}

    def set(self, key: str, value: Any, *, flag: str) -> None:
        """Write `value` at a dotted `key`, making sections on the way; InputError when a value is in the way."""
        *sections, last = key.split(".")
        target = self._content
        for depth, section in enumerate(sections):
            below = target.get(section)
            if below is not None and not isinstance(below, dict):
                place = ".".join(sections[: depth + 1])
                raise InputError(f"{flag}: '{place}' is a value, not a section of keys")
            # A copy, so that the caller's nested mappings are never written to.
            target[section] = dict(below or {})
            target = target[section]
        target[last] = value
        self._origins.pop(key, None)
        self._origins[key] = flag
        self._forget_derived(key)

    def set_trace(self, trace: str, *, flag: str) -> None:
        """Replay `trace` instead of the workload; the other settings of a trace workload stay."""
        workload = self._content.get("workload")
        if not isinstance(workload, dict) or workload.get("kind") != "trace":
            self.set("workload", {"kind": "trace"}, flag=flag)
        self.set("workload.trace", trace, flag=flag)

    def get(self, key: str) -> Any:
        """The value at a dotted key, None where there is none."""
        value: Any = self._content
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def drop(self, key: str) -> None:
        """Forget a top-level key of the file."""
        self._content.pop(key, None)

    def given(self, key: str, *, exactly: bool = False) -> bool:
        """Whether a flag wrote `key` or, unless `exactly`, a section that it is in."""
        return any(key == own or (not exactly and key.startswith(f"{own}.")) for own in self._origins)

    def model(self) -> ModelArch:
        """The model as it stands; InputError when it is unknown."""
        value = self.get("model")
        if isinstance(value, str):
            return catalog.model(self._path("model", value))
        return value if isinstance(value, ModelArch) else validated(ModelArch, value or {}, where=self._where("model"))

    def node(self) -> Node:
        """The hardware as it stands; InputError when it is unknown."""
        value = self.get("hardware")
        if isinstance(value, dict) and "node" in value:
            return validated(Cluster, value, where=self._where("hardware")).node
        if not isinstance(value, str | Node | Cluster):
            return validated(Node, value or {}, where=self._where("hardware"))
        machine = self._machine("hardware", value)
        return machine.node if isinstance(machine, Cluster) else machine

    def resolve(self) -> Scenario:
        """The resolved scenario; InputError or InfeasibleError with its place when something is wrong."""
        file = validated(ScenarioFile, self._content, where=self._where)
        model = file.model if isinstance(file.model, ModelArch) else catalog.model(self._path("model", file.model))
        machine = self._machine("hardware", file.hardware)
        cluster = machine if isinstance(machine, Cluster) else None
        node = machine.node if isinstance(machine, Cluster) else machine
        check_parallel(file.parallel, model=model, node=node, cluster=cluster)
        calibration = file.calibration or find_calibration(
            accelerator=node.accelerator.name, engine=file.engine, version=file.engine_version
        )
        policy = resolve_policy(file.policy, model=model, accelerator=node.accelerator)
        own = ReplicaGroup(name="own", count=1, hardware=node, parallel=file.parallel, policy=policy,
                           calibration=calibration)  # fmt: skip
        deployment = resolve_deployment(
            file.deployment, model=model, own=own, policy=file.policy, where=self._where, node=self._node,
            cluster=cluster,
            calibration=lambda node, group: find_calibration(
                accelerator=node.accelerator.name, engine=group.engine or file.engine,
                # Another engine's version says nothing about this one's.
                version=group.engine_version or (file.engine_version if group.engine in (None, file.engine) else None),
            ),
        )  # fmt: skip
        return Scenario(
            name=file.name if "name" in self._content else automatic_name(model, parallel=file.parallel, node=node),
            model=model,
            hardware=node,
            cluster=cluster,
            parallel=file.parallel,
            policy=policy,
            deployment=deployment,
            workload=self._workload(file.workload),
            slo=file.slo,
            calibration=calibration,
            seed=file.seed,
            samples=file.samples,
        )

    def _forget_derived(self, key: str) -> None:
        """Drop what belongs to something replaced: curves of an old device, an old engine's version, a trace's hash."""
        if key in ("hardware", "engine", "engine_version") and "calibration" not in self._origins:
            self._content.pop("calibration", None)
        if key == "engine" and "engine_version" not in self._origins:
            self._content.pop("engine_version", None)
        if key == "workload.trace":
            self._content["workload"].pop("content_hash", None)

    def _where(self, place: str) -> str:
        for key, flag in reversed(self._origins.items()):
            if place == key:
                return flag
            if place and (place.startswith(f"{key}.") or key.startswith(f"{place}.")):
                return f"{flag}: {place}"
        return f"{self._source}: {place}" if place else self._source

    def _path(self, key: str, value: str) -> str:
        """A path inside a scenario file is relative to that file; one from a flag, to the working directory."""
        if key in self._origins or self._directory is None:
            return value
        try:
            beside = self._directory / value
            return str(beside) if beside.is_file() else value
        except (OSError, ValueError):
            return value

    def _node(self, place: str, reference: str | Node) -> Node:
        return reference if isinstance(reference, Node) else catalog.node(self._path(place, reference))

    def _machine(self, place: str, reference: str | Node | Cluster) -> Node | Cluster:
        return catalog.machine(self._path(place, reference)) if isinstance(reference, str) else reference

    def _workload(self, workload: Workload) -> Workload:
        if not isinstance(workload, TraceWorkload):
            return workload
        trace = workload.trace if "workload" in self._origins else self._path("workload.trace", workload.trace)
        content_hash = file_hash(catalog.trace_path(trace))
        if workload.content_hash not in (None, content_hash):
            raise InputError(
                f"{self._source}: workload.content_hash: the trace '{shorten(workload.trace)}' is not the one this"
                " scenario was made with; remove content_hash to accept it"
            )
        return workload.model_copy(update={"trace": trace, "content_hash": content_hash})


def load_scenario(path: str | Path | None = None, *, overrides: Sequence[str] = (), slo: Sequence[str] = (),
                  model: str | None = None, hardware: str | None = None, trace: str | None = None,
                  tp: int | None = None, engine: str | None = None, seed: int | None = None,
                  rate: float | None = None, command: EngineCommand | None = None) -> Scenario:  # fmt: skip
    """The resolved scenario of a YAML file (or a packaged scenario's name; None: the default one) under some flags.

    `overrides` are `key=value` with a dotted key and a YAML value, `slo` likewise with keys such as `ttft.p95`; later
    ones win, and `overrides` win over the other flags. `command`, an engine's command line, replaces the file's
    `parallel` and `policy`; the flags win over it. Raises InputError or InfeasibleError, naming the place.
    """
    draft = read_draft(DEFAULT_SCENARIO if path is None else path)
    if command is not None:
        command.begin(draft)
    flags = {"model": ("--model", model), "hardware": ("--hardware", hardware), "parallel.tp": ("--tp", tp),
             "engine": ("--engine", engine), "seed": ("--seed", seed)}  # fmt: skip
    for key, (flag, value) in flags.items():
        if value is not None:
            draft.set(key, value, flag=flag)
    if trace is not None:
        draft.set_trace(trace, flag="--trace")
    if rate is not None:
        draft.set("workload.arrivals.rate", rate, flag="--rate")
    for text in slo:
        key, value = _assignment(text, flag="--slo", example="ttft.p95=500ms")
        draft.set(f"slo.{key}", value, flag=f"--slo {key}")
    for text in overrides:
        key, value = _assignment(text, flag="--set", example="parallel.tp=8")
        draft.set(key, value, flag=f"--set {key}")
    if command is not None:
        command.finish(draft)
    return draft.resolve()


def read_draft(path: str | Path) -> Draft:
    """The unresolved content of a scenario file or packaged scenario."""
    file = scenario_path(path)
    return Draft(load_yaml(file), source=str(file), directory=file.parent)


def scenario_path(name_or_path: str | Path) -> Path:
    """The file of the packaged scenario of this name, or the path itself when it is one; InputError when neither."""
    path = Path(name_or_path)
    if path.suffix.lower() in (".yaml", ".yml", ".json") or len(path.parts) > 1:
        return path
    known = _scenario_files()
    if path.name.lower() in known:
        return known[path.name.lower()]
    if path.exists():
        return path
    hint = nearest(path.name, known) or f"; known: {', '.join(sorted(known))}"
    raise InputError(f"unknown scenario '{shorten(str(path))}': expected a YAML file or a packaged scenario{hint}")


def list_scenarios() -> dict[str, str]:
    """The packaged scenarios: name and title, sorted by name."""
    files = _scenario_files()
    return {name: str(load_yaml(files[name]).get("name", name)) for name in sorted(files)}


def _scenario_files() -> dict[str, Path]:
    # Reversed, so that the first directory that has a name wins.
    return {file.stem.lower(): file for root in reversed(catalog.data_directories())
            for file in (root / "workloads" / "scenarios").glob("*.yaml")}  # fmt: skip


def automatic_name(model: ModelArch, *, parallel: ParallelPlan, node: Node) -> str:
    """What a scenario is called when nobody named it: `llama-3.1-8b-instruct on 1x h100-80gb-sxm`."""
    return f"{model.name} on {parallel.tp}x {node.accelerator.name}"


def find_calibration(*, accelerator: str, engine: str, version: str | None = None) -> Calibration:
    """The packaged coefficients for an accelerator and an engine profile; InputError when there are none.

    `version` is the engine's: its kernels are those of the nearest one that was timed, by default the newest.
    """
    for root in catalog.data_directories():
        path = root / "hardware" / "calibration" / f"{CALIBRATION}.yaml"
        if path.is_file():
            return load_calibration(path, accelerator=accelerator, engine=engine, version=version)
    raise InputError(f"no hardware/calibration/{CALIBRATION}.yaml in any data directory")


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces; InputError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"'{shorten(str(path))}' cannot be read: {error.strerror}") from None


def _assignment(text: str, *, flag: str, example: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not _KEY.match(key.strip()):
        raise InputError(f"{flag}: expected KEY=VALUE such as {example}, got '{shorten(text)}'")
    try:
        return key.strip(), parse_yaml_value(value)
    except InputError as error:
        raise InputError(f"{flag} {shorten(key.strip())}: {error}") from None
