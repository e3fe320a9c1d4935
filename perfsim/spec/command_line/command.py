"""An engine's command line as a scenario's settings: read, laid over a draft, and reported on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perfsim.errors import InputError
from perfsim.spec.command_line import sglang, trtllm, vllm
from perfsim.spec.command_line.invocation import Invocation, find_invocation, relevant_variables
from perfsim.spec.command_line.parse import Given, parse
from perfsim.spec.command_line.plan import Plan
from perfsim.spec.command_line.table import FlagTable, load_table
from perfsim.spec.yaml import load_yaml

if TYPE_CHECKING:
    from perfsim.spec.load import Draft
    from perfsim.spec.model import ModelArch

_TRANSLATORS: dict[str, Callable[[Plan], None]] = {
    "vllm": vllm.translate, "sglang": sglang.translate, "trtllm": trtllm.translate,
}  # fmt: skip
_MODEL = {"vllm": "model", "sglang": "model-path"}
_CONFIG = {"vllm": "config", "sglang": "config", "trtllm": "extra_llm_api_options"}
# What a command line cannot say, so that a scenario file may: it survives when the command line names the feature.
_KEPT = ("policy.speculative.acceptance", "policy.speculative.draft_parameters", "policy.lora.num_adapters",
         "policy.lora.popularity")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandReport:
    """What became of a command line: `modelled` scenario keys by flag, flags without effect, and warnings."""

    engine: str
    table: str
    modelled: dict[str, list[str]]
    ignored: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(slots=True, kw_only=True)
class EngineCommand:
    """A parsed command line of one engine; `report` is there once it has been laid over a draft."""

    option: str
    table: FlagTable
    invocation: Invocation
    model: str | None
    given: tuple[Given, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    report: CommandReport | None = None
    _kept: dict[str, Any] = field(default_factory=dict)

    def begin(self, draft: Draft) -> None:
        """Before other flags: the command line says how the engine is run, so what it leaves out is no file's value."""
        self._kept = {key: value for key in _KEPT if (value := draft.get(key)) is not None}
        draft.drop("parallel")
        draft.drop("policy")
        draft.set("engine", self.table.engine, flag=self.option)
        if self.model is not None:
            draft.set("model", _model_reference(self.model), flag=self.option)

    def finish(self, draft: Draft) -> None:
        """After other flags, which win: everything the command line says about the model and device they name.

        Raises InputError for what the engine would refuse and for what no default may fill, such as the acceptance of
        draft tokens.
        """
        values = {given.flag.name: given.value for given in self.given}
        model, accelerator = self._resolved_model(draft), draft.node().accelerator
        plan = Plan(table=self.table, values=values, model=model, accelerator=accelerator, chosen=draft.get,
                    options=self.options)  # fmt: skip
        try:
            self._translate(plan)
        except InputError as error:
            raise InputError(f"{self.option}: {error}") from None
        for setting in plan.settings:
            if setting.key == "model" or not draft.given(setting.key):
                flag = f"{self.option} {setting.flag or f'({self.table.program} default)'}"
                draft.set(setting.key, setting.value, flag=flag)
        for key, value in self._kept.items():
            if draft.get(key) is None and draft.get(key.rpartition(".")[0]) is not None:
                draft.set(key, value, flag=f"scenario {key}")
        for key, why in plan.missing:
            section = key.rpartition(".")[0]
            if draft.get(key) is None and not (draft.given(section, exactly=True) and draft.get(section) is None):
                raise InputError(f"{self.option}: {why}; add --set {key}=VALUE")
        self.report = self._reported(plan)

    def _resolved_model(self, draft: Draft) -> ModelArch:
        try:
            return draft.model()
        except InputError as error:
            if self.model is None or draft.get("model") != _model_reference(self.model):
                raise
            raise InputError(f"{self.option}: {error} (--model names what stands in for it)") from None

    def _translate(self, plan: Plan) -> None:
        for given in self.given:
            if given.flag.role == "key" and given.flag.key is not None:
                plan.set(given.flag.key, plan.get(given.flag.name), given.flag.name)
        _TRANSLATORS[self.table.engine](plan)
        for key, value in self.table.defaults.items():
            if plan.setting(key) is None:
                plan.set(key, value)

    def _reported(self, plan: Plan) -> CommandReport:
        modelled: dict[str, list[str]] = {}
        for setting in plan.settings:
            told = setting.flag or "default"
            value = setting.value if isinstance(setting.value, (str, int, float, bool)) else "..."
            modelled.setdefault(told, []).append(f"{setting.key}={value}")
        ignored = {given.flag.names[0] for given in self.given
                   if given.flag.role == "irrelevant" or _is_default(given)}  # fmt: skip
        matter, harmless = relevant_variables(self.invocation.environment, self.table)
        warnings = [*self._unmodelled(), *plan.warnings, *self._around(matter), *self.table.approximations]
        return CommandReport(
            engine=self.table.engine, table=f"{self.table.program} {self.table.version}", modelled=modelled,
            ignored=(*sorted(ignored), *sorted(harmless)),
            warnings=tuple(f"{self.option}: {text}" for text in warnings),
        )  # fmt: skip

    def _unmodelled(self) -> list[str]:
        topics: dict[str, list[str]] = {}
        for given in self.given:
            if given.flag.role == "unmodelled" and not _is_default(given):
                topics.setdefault(str(given.flag.topic), []).append(given.flag.names[0])
        names = [given.flag.names[0] for given in self.given]
        twice = sorted({name for name in names if names.count(name) > 1})
        found = [f"not modelled: {', '.join(dict.fromkeys(flags))} ({topic})" for topic, flags in topics.items()]
        return found + [f"given more than once, the last one holds: {', '.join(twice)}"] * bool(twice)

    def _around(self, variables: Sequence[str]) -> list[str]:
        """Variables are named without their values, which may be secrets."""
        found = [f"not modelled: {', '.join(variables)} (environment)"] if variables else []
        for what, words in (("options of", self.invocation.wrapper), ("other commands:", self.invocation.others)):
            if words:
                found.append(f"not read: {what} {'; '.join(words[:6])}{'; ...' if len(words) > 6 else ''}")
        unknown = [key for key in _paths(self.options) if key not in _known_options(self.table)]
        return found + [f"not modelled: {', '.join(unknown)} (options file)"] * bool(unknown)


def read_command(engine: str, text: str) -> EngineCommand:
    """The command line in `text` (or in the file that `@FILE` names) as one of `engine`.

    Raises InputError, with the nearest valid name, for an unknown flag; for a value of the wrong type, an unbalanced
    quote, an unreadable file, or no or several commands that start the engine.
    """
    table = load_table(engine)
    option = f"--{engine}"
    try:
        invocation = find_invocation(text, table)
        words = list(invocation.words)
        if engine != "trtllm":
            words = _with_config(words, table)
        parsed = parse(words, table)
        given = parsed.given
        options: Mapping[str, Any] = {}
        for each in given:
            if engine == "trtllm" and each.flag.name == _CONFIG[engine]:
                options = load_yaml(each.value)
        given = (*given, *_from_options(options, table))
    except InputError as error:
        raise InputError(f"{option}: {error}") from None
    named = [each.value for each in given if each.flag.name == _MODEL.get(engine)]
    model = parsed.model or (named[-1] if named else None)
    return EngineCommand(option=option, table=table, invocation=invocation, model=model, given=given, options=options)


def _with_config(words: list[str], table: FlagTable) -> list[str]:
    """The words of a `--config FILE` before the others, so that those win, as vLLM and SGLang do."""
    for index, word in enumerate(words):
        name, equals, path = word.partition("=")
        if name == "--config" and (equals or index + 1 < len(words)):
            path = path if equals else words[index + 1]
            content = load_yaml(path)
            rest = words[:index] + words[index + (1 if equals else 2) :]
            lead = rest[:1] if rest and not rest[0].startswith("-") else []
            return [*lead, *_as_words(content, table), *rest[len(lead) :]]
    return words


def _as_words(content: Mapping[str, Any], table: FlagTable) -> list[str]:
    found: list[str] = []
    for key, value in content.items():
        if isinstance(value, bool):
            switch = next((flag.kind for flag in table.flags if f"--{key}" in flag.names), "bool")
            found += [f"--{key}"] if value else [f"--no-{key}"] if switch == "bool" else []
        elif isinstance(value, list):
            found += [f"--{key}", *map(str, value)] if value else []
        elif value is not None:
            found += [f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return found


def _from_options(options: Mapping[str, Any], table: FlagTable) -> list[Given]:
    """TensorRT-LLM's options file overwrites the command line; those of its keys that are options come as such."""
    found = []
    for key, value in _paths(options).items():
        if key in table.options.get("flags", {}) and value is not None:
            found.append(Given(table.named(table.options["flags"][key]), value))
    return found


def _known_options(table: FlagTable) -> set[str]:
    return {*table.options.get("flags", {}), *table.options.get("rules", ()), *table.options.get("irrelevant", ())}


def _paths(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in options.items():
        found.update(_paths(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value})
    return found


def _is_default(given: Given) -> bool:
    default = given.flag.default
    return default is not None and given.value == default and given.flag.role == "unmodelled"


def _model_reference(model: str) -> str:
    """A local checkpoint's config.json, else the name as it is."""
    try:
        config = Path(model).expanduser() / "config.json"
        return str(config) if config.is_file() else model
    except (OSError, ValueError):
        return model
