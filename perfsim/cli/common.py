"""What the verbs share: the flags that make up a scenario, and printing as table, JSON or CSV."""

from __future__ import annotations

import csv
import functools
import inspect
import io
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perfsim.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from perfsim.metrics.result import Result
    from perfsim.spec.command_line import CommandReport, EngineCommand
    from perfsim.spec.scenario import Scenario


PIPE_WIDTH = 240


class Format(StrEnum):
    """How data is printed on standard output."""

    table = "table"
    json = "json"
    csv = "csv"


FormatOption = Annotated[Format, typer.Option("--format", help="How to print.")]
SamplesOption = Annotated[
    int | None,
    typer.Option("--samples", metavar="N", show_default=False, help="Bands from N runs, all coefficients drawn anew."),
]
BandsOption = Annotated[
    bool, typer.Option("--bands/--no-bands", help="5-95% bands of the headline metrics, from about eight more runs.")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenarioFlags:
    """The scenario file and the flags laid over it, as given on the command line; each field is a Typer option."""

    scenario: Annotated[
        str | None,
        typer.Argument(
            metavar="[SCENARIO]",
            show_default=False,
            help="YAML file or packaged name (`perfsim list scenarios`); without it, a default scenario.",
        ),
    ] = None
    model: Annotated[
        str | None,
        typer.Option(
            help="Name (`perfsim list models`), Hugging Face id or path of a config.json.", show_default=False
        ),
    ] = None
    hardware: Annotated[
        str | None,
        typer.Option(help="Name of an accelerator or node (`perfsim list hardware`).", show_default=False),
    ] = None
    trace: Annotated[
        str | None,
        typer.Option(
            help="Name (`perfsim list traces`) or CSV, JSONL or Parquet file with the columns"
            " arrival_s, prompt_tokens, output_tokens.",
            show_default=False,
        ),
    ] = None
    rate: Annotated[
        float | None, typer.Option(help="Requests or sessions per second, of a synthetic workload.", show_default=False)
    ] = None
    tp: Annotated[
        int | None, typer.Option("--tp", help="Tensor parallel size: GPUs per replica.", show_default=False)
    ] = None
    engine: Annotated[
        str | None, typer.Option(help="Profile of what the engine adds to the kernels.", show_default=False)
    ] = None
    vllm: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND", help="A command line of `vllm serve`, or @FILE that holds one.", show_default=False
        ),
    ] = None
    sglang: Annotated[
        str | None, typer.Option(metavar="COMMAND", help="Likewise, of `sglang serve`.", show_default=False)
    ] = None
    trtllm: Annotated[
        str | None, typer.Option(metavar="COMMAND", help="Likewise, of `trtllm-serve`.", show_default=False)
    ] = None
    seed: Annotated[int | None, typer.Option(help="Seed of everything that is drawn.", show_default=False)] = None
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any value of the scenario, such as workload.arrivals.rate=4; repeatable.",
            show_default=False,
        ),
    ] = None
    slo: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC.STATISTIC=TIME", help="A promise such as ttft.p95=500ms; repeatable.", show_default=False
        ),
    ] = None

    def resolve(self) -> Scenario:
        """The scenario they describe; InputError or InfeasibleError when there is none."""
        return self.resolve_command()[0]

    def resolve_command(self) -> tuple[Scenario, CommandReport | None]:
        """The scenario, and what became of the engine's command line if there is one, told on standard error."""
        from perfsim.spec.load import load_scenario

        command = self._command()
        scenario = load_scenario(
            self.scenario,
            command=command,
            overrides=self.overrides or (),
            slo=self.slo or (),
            model=self.model,
            hardware=self.hardware,
            trace=self.trace,
            rate=self.rate,
            tp=self.tp,
            engine=self.engine,
            seed=self.seed,
        )
        report = None if command is None else command.report
        if report is not None:
            for warning in report.warnings:
                print(f"warning: {warning}", file=sys.stderr)
            if report.ignored:
                print(f"without effect on speed or memory: {', '.join(report.ignored)}", file=sys.stderr)
        return scenario, report

    def _command(self) -> EngineCommand | None:
        """The engine's command line; InputError when there are several."""
        texts = {"vllm": self.vllm, "sglang": self.sglang, "trtllm": self.trtllm}
        given = {engine: text for engine, text in texts.items() if text is not None}
        if not given:
            return None
        if len(given) > 1:
            raise InputError(f"expected one command line, got {' and '.join(f'--{engine}' for engine in given)}")
        from perfsim.spec.command_line import read_command

        ((engine, text),) = given.items()
        return read_command(engine, text)


def check_bands(*, bands: bool, samples: int | None) -> None:
    """InputError for samples of bands that nobody wants."""
    if samples is not None and not bands:
        raise InputError("--samples makes bands and --no-bands leaves them out; give one of the two")


def takes_scenario(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb, whose first parameter is a ScenarioFlags, those flags as command-line options."""
    own = list(inspect.signature(verb, eval_str=True).parameters.values())[1:]
    shared = inspect.signature(ScenarioFlags, eval_str=True).parameters.values()
    names = [field.name for field in fields(ScenarioFlags)]

    @functools.wraps(verb)
    def command(**given: Any) -> None:
        flags = ScenarioFlags(**{name: given.pop(name) for name in names})
        verb(flags, **given)

    own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    # What typer reads the options from; functions take any attribute, their type declares only some.
    vars(command)["__signature__"] = inspect.Signature([*shared, *own])
    return command


def with_report(result: Result, report: CommandReport | None) -> Result:
    """The result that also says what became of the engine's command line."""
    if report is None:
        return result
    told = {"flags_of": report.table, "modelled": report.modelled, "ignored": [*report.ignored],
            "warnings": [*report.warnings]}  # fmt: skip
    return replace(result, warnings=[*report.warnings, *result.warnings],
                   provenance={**result.provenance, "command_line": told})  # fmt: skip


def console() -> Console:
    """Standard output for tables: colour only on a terminal and never with NO_COLOR; a pipe gets unfolded lines."""
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def print_json(data: Any) -> None:
    """One JSON document; NaN is an error, because no other reader would accept it."""
    typer.echo(json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False))


def print_csv(rows: Sequence[dict[str, Any]], *, columns: Sequence[str]) -> None:
    """A header and one line per row; missing values are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    typer.echo(text.getvalue(), nl=False)


def print_rows(rows: Sequence[dict[str, Any]], *, columns: Sequence[str], output: Format) -> None:
    """Equal records in the chosen format."""
    if output is Format.json:
        print_json(rows)
    elif output is Format.csv:
        print_csv(rows, columns=columns)
    else:
        print_table([{name: _cell(row.get(name)) for name in columns} for row in rows], columns=columns)


def print_table(rows: Sequence[dict[str, str]], *, columns: Sequence[str]) -> None:
    """Rows of text as an aligned table without frames, so that it can be copied; columns of numbers align right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in columns:
        numeric = bool(rows) and all(row[name][:1].isdigit() or row[name] in ("", "–") for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(row[name]) for name in columns))
    console().print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
