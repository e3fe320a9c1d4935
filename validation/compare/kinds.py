"""Which kind of table this is, by its columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from perfsim.errors import InputError
from validation.compare import inferencex, isim, llmservingsim, silicon
from validation.compare.outcome import Outcome
from validation.compare.table import Table


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of table: the columns that it must have, and its comparison, which may drop repeated rows."""

    name: str
    columns: frozenset[str]
    compare: Callable[[Table], tuple[Table, Outcome]]


KINDS = (
    Kind("vLLM load tests of inference-sim, by stage", isim.STAGES, isim.compare_stages),
    Kind("vLLM load tests of inference-sim, by request", isim.REQUESTS, isim.compare_requests),
    Kind("vLLM runs of LLMServingSim, by request", llmservingsim.REQUESTS, llmservingsim.compare_requests),
    Kind("vLLM runs of LLMServingSim, by second", llmservingsim.SERIES, llmservingsim.compare_series),
    Kind("serving measurements of aiconfigurator", silicon.COLUMNS, silicon.compare),
    Kind("InferenceX", inferencex.SERVING, inferencex.compare_serving),
    Kind("InferenceX, decode over position", inferencex.POSITION, inferencex.compare_position),
)


def kind_of(table: Table) -> Kind:
    """The kind whose columns are all there, the one with the most of them; InputError when there is none."""
    names = set(table.names)
    fitting = [kind for kind in KINDS if kind.columns <= names]
    if fitting:
        return max(fitting, key=lambda kind: len(kind.columns))
    near = max(KINDS, key=lambda kind: len(kind.columns & names) / len(kind.columns))
    lacking = ", ".join(sorted(near.columns - names)[:5])
    raise InputError(
        f"--table: '{table.path.name}' has columns of no known kind; nearest: '{near.name}', which also has {lacking}"
    )
