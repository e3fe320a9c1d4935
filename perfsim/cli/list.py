"""`perfsim list`: what can be named in a scenario."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any

import typer

from perfsim.cli.common import Format, FormatOption, print_rows


class Kind(StrEnum):
    """What to list."""

    models = "models"
    hardware = "hardware"
    traces = "traces"
    scenarios = "scenarios"


def list_names(kind: Annotated[Kind, typer.Argument(help="What to list.", show_default=False)],
               output: FormatOption = Format.table) -> None:  # fmt: skip
    """List the models, hardware, traces or scenarios that perfsim knows by name."""
    columns, rows = {
        Kind.models: _models, Kind.hardware: _hardware, Kind.traces: _traces, Kind.scenarios: _scenarios,
    }[kind]()  # fmt: skip
    print_rows(rows, columns=columns, output=output)


Listing = tuple[list[str], list[dict[str, Any]]]


def _models() -> Listing:
    from perfsim.ops.params import active_params, kv_bytes_per_token, state_bytes_per_sequence, total_params
    from perfsim.spec import catalog

    rows = []
    for name in catalog.list_models():
        model = catalog.model(name)
        rows.append({
            "name": name, "hf_id": model.hf_id, "architecture": model.architecture,
            "total_params": total_params(model), "active_params": active_params(model),
            "kv_bytes_per_token": kv_bytes_per_token(model),
            "state_bytes_per_sequence": state_bytes_per_sequence(model),
            "max_position_embeddings": model.max_position_embeddings,
        })  # fmt: skip
    return ["name", "total_params", "active_params", "kv_bytes_per_token", "max_position_embeddings"], rows


def _hardware() -> Listing:
    from perfsim.spec import catalog

    kinds: dict[str, tuple[list[str], Callable[[str], Any]]] = {
        "accelerator": (catalog.list_accelerators(), catalog.accelerator),
        "node": (catalog.list_nodes(), catalog.node),
        "cluster": (catalog.list_clusters(), catalog.cluster),
        "link": (catalog.list_links(), catalog.link),
        "storage": (catalog.list_storage(), catalog.storage),
    }
    rows: list[dict[str, Any]] = []
    for kind, (names, load) in kinds.items():
        for name in names:
            found = load(name)
            doubts = sorted(field for field, fact in found.sources.items() if not fact.verified)
            count = 1 if kind == "accelerator" else getattr(found, "accelerator_count", None)
            rows.append({
                "name": name, "kind": kind, "accelerators": count, "facts": len(found.sources),
                "sources": len({fact.source for fact in found.sources.values()}), "unverified": len(doubts),
                "unverified_fields": ", ".join(doubts), "label": found.label,
            })  # fmt: skip
    return ["name", "kind", "accelerators", "facts", "sources", "unverified", "label"], rows


def _traces() -> Listing:
    from perfsim.spec import catalog

    rows: list[dict[str, Any]] = []
    for name in catalog.list_traces():
        path = catalog.trace_path(name)
        rows.append({"name": name, "file": path.name, "bytes": path.stat().st_size})
    return ["name", "file", "bytes"], rows


def _scenarios() -> Listing:
    from perfsim.spec.load import list_scenarios

    return ["name", "title"], [{"name": name, "title": title} for name, title in list_scenarios().items()]
