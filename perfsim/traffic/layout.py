"""Which column of a trace file means what: perfsim's own names, Mooncake's and Azure's."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from perfsim.errors import InputError, nearest

REQUIRED = ("arrival_s", "prompt_tokens", "output_tokens")
# Columns of published traces that say nothing the simulator uses.
IGNORED = frozenset({"trace", "request_index"})
# Optional columns that any layout may have, by the names they go under; of several, the first one counts.
LABELS = {
    "session_id": ("session_id", "conversation_id", "chat_id", "user_id"),
    "adapter": ("adapter", "lora", "lora_name", "lora_id", "model"),
}
# A file with these is the requests.parquet of a run: in order of completion, and with results that are not read.
RUN = frozenset({"request_index", "arrival_s", "queued_s", "finish_s"})


@dataclass(frozen=True, slots=True)
class Layout:
    """How one file names things: `columns` maps perfsim's name of a quantity to the file's.

    `seconds_per_unit` converts the arrival column, None when it holds dates and times. `hash_block_tokens` is the
    number of tokens per block id where the layout fixes it, else the file says it in a column. `unordered`: the
    requests must be put in order of arrival first.
    """

    columns: Mapping[str, str]
    seconds_per_unit: float | None = 1.0
    hash_block_tokens: int | None = None
    unordered: bool = False


PERFSIM = Layout({name: name for name in (*REQUIRED, "priority", "hash_block_ids", "hash_block_tokens")})
# kvcache-ai/Mooncake, FAST25-release/traces: milliseconds, one id per 512 tokens.
MOONCAKE = Layout(
    {
        "arrival_s": "timestamp",
        "prompt_tokens": "input_length",
        "output_tokens": "output_length",
        "hash_block_ids": "hash_ids",
    },
    seconds_per_unit=1e-3,
    hash_block_tokens=512,
)
# Azure/AzurePublicDataset, AzureLLMInferenceTrace_*.csv.
AZURE = Layout(
    {"arrival_s": "TIMESTAMP", "prompt_tokens": "ContextTokens", "output_tokens": "GeneratedTokens"},
    seconds_per_unit=None,
)


def file_name(path: object) -> str:
    """A path for an error message, which must stay one line."""
    return str(path).replace("\n", "\\n").replace("\r", "\\r")


def shown(value: object) -> str:
    """A value from a file for an error message: one short line."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def first_line(error: Exception) -> str:
    """What a library said about a file, cut to one line."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:160]


def find_layout(names: Sequence[str], *, where: str, need_arrivals: bool = True) -> Layout:
    """The layout of a file with columns `names`, reduced to the columns that are present.

    The layout that shares most names wins. Without `need_arrivals` the arrival column is not read and may be absent.
    Raises InputError, beginning with `where`, on unknown, repeated and missing columns.
    """
    present = set(names)
    layout = max((PERFSIM, MOONCAKE, AZURE), key=lambda candidate: len(present & set(candidate.columns.values())))
    valid = list(layout.columns.values())
    labels = {name for synonyms in LABELS.values() for name in synonyms}
    required = [layout.columns[name] for name in REQUIRED if need_arrivals or name != "arrival_s"]
    of_run = present >= RUN
    for name in names:
        if not of_run and name not in valid and name not in IGNORED and name not in labels:
            raise InputError(f"{where}: unknown column {shown(name)}{nearest(name, valid)}{_expected(valid, required)}")
        if names.count(name) > 1:
            raise InputError(f"{where}: column {shown(name)} appears twice; expected each column once")
    for name in required:
        if name not in present:
            found = ", ".join(shown(name) for name in names[:8]) or "no columns"
            raise InputError(f"{where}: missing column '{name}'; found {found}{_expected(valid, required)}")
    columns = {key: name for key, name in layout.columns.items() if name in present}
    for key, synonyms in LABELS.items():
        named = next((name for name in synonyms if name in present), None)
        if named is not None:
            columns[key] = named
    if "hash_block_ids" in columns and layout.hash_block_tokens is None and "hash_block_tokens" not in columns:
        raise InputError(f"{where}: missing column 'hash_block_tokens', the tokens per id of 'hash_block_ids'")
    if not need_arrivals:
        columns.pop("arrival_s", None)
    return Layout(columns, layout.seconds_per_unit, layout.hash_block_tokens, of_run)


def _expected(valid: Collection[str], required: Collection[str]) -> str:
    optional = ", ".join(sorted((set(valid) - set(required)) | IGNORED | set(LABELS)))
    return f"; expected {', '.join(required)} (optional: {optional})"
