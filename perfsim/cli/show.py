"""`perfsim show`: what perfsim knows about one model, machine or scenario, and where it knows it from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from perfsim.cli.common import (
    Format,
    FormatOption,
    ScenarioFlags,
    print_csv,
    print_json,
    print_table,
    takes_scenario,
)

app = typer.Typer(help="Show a model, a piece of hardware or a resolved scenario.")

# What a number means follows from the end of its field's name; the first match wins.
_UNITS = (
    ("bytes_per_sequence", "bytes"), ("peak_flops", "FLOP/s"), ("measured", "bytes/s"), ("per_connection", "bytes/s"),
    ("bandwidth", "bytes/s"), ("capacity", "bytes"), ("bytes", "bytes"), ("latency", "s"),
    ("clock", "Hz"), ("power", "W"), ("tdp", "W"), ("price_per_hour", "USD"),
)  # fmt: skip
# Memories are binary: 80 GiB reads better than 85.9 GB.
_BINARY = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


@app.command("model")
def model(name: Annotated[str, typer.Argument(help="Name, Hugging Face id or path of a config.json.",
                                              show_default=False)],
          output: FormatOption = Format.table) -> None:  # fmt: skip
    """Show a model's shape, parameters and KV-cache footprint."""
    from perfsim.ops import params
    from perfsim.spec import catalog

    arch = catalog.model(name)
    facts: dict[str, Any] = {
        "name": arch.name, "hf_id": arch.hf_id, "architecture": arch.architecture,
        "total_params": params.total_params(arch), "active_params": params.active_params(arch),
        "vision_params": params.vision_params(arch), "mtp_params": params.mtp_params(arch),
        "kv_bytes_per_token": params.kv_bytes_per_token(arch),
        "state_bytes_per_sequence": params.state_bytes_per_sequence(arch), "weight_bytes": params.weight_bytes(arch),
        "num_hidden_layers": arch.num_hidden_layers, "hidden_size": arch.hidden_size, "vocab_size": arch.vocab_size,
        "max_position_embeddings": arch.max_position_embeddings, "dtype": arch.dtype,
        "attention_dtype": arch.attention_weights, "linear_dtype": arch.linear_dtype, "expert_dtype": arch.expert_dtype,
        "tie_word_embeddings": arch.tie_word_embeddings,
    }  # fmt: skip
    if output is Format.json:
        print_json({**facts, "layers": [group.model_dump(mode="json") for group in arch.layers]})
        return
    for index, group in enumerate(arch.layers):
        facts[f"layers.{index}"] = f"{group.count} x ({_shape(group.attention)}; {_shape(group.mlp)})"
    if output is Format.csv:
        print_csv([{"field": key, "value": value} for key, value in facts.items()], columns=["field", "value"])
    else:
        rows = [{"field": key, "value": _readable(key, value)} for key, value in facts.items()]
        print_table(rows, columns=["field", "value"])


@app.command("hardware")
def hardware(name: Annotated[str, typer.Argument(help="Name of an accelerator, node, cluster, link or store.",
                                                 show_default=False)],
             output: FormatOption = Format.table) -> None:  # fmt: skip
    """Show a piece of hardware, the source of every value, and which values nobody has verified."""
    from perfsim.spec import catalog

    found = catalog.hardware(name)
    if output is Format.json:
        print_json({**found.model_dump(mode="json"), **_derived(found)})
        return
    rows = [{"field": key, "value": value} for key, value in _flatten(_derived(found)).items()] + _sourced(found)
    if output is Format.csv:
        print_csv(rows, columns=["field", "value", "source", "verified", "note"])
        return
    sources = list(dict.fromkeys(row["source"] for row in rows if "source" in row))
    shown = [{"field": row["field"], "value": _readable(row["field"], row["value"]),
              "source": _reference(row, sources)} for row in rows]  # fmt: skip
    print_table(shown, columns=["field", "value", "source"])
    typer.echo("\nSources")
    for number, source in enumerate(sources, start=1):
        typer.echo(f" [{number}] {source}")
    doubts = [row for row in rows if row.get("verified") is False]
    if doubts:
        typer.echo("\nNot verified (marked ?)")
    for row in doubts:
        typer.echo(f" {row['field']}: {row['note'] or row['source']}")


def _derived(found: Any) -> dict[str, Any]:
    """What the cost model makes of a cluster's network: the tiers that it needs, and its bisection."""
    from perfsim.cost.topology import bisection, network_tiers
    from perfsim.spec.cluster import Cluster

    if not isinstance(found, Cluster):
        return {}
    tiers = {tier.name: {"nodes": tier.nodes, "gpu_bandwidth": tier.bandwidth, "latency": tier.latency,
                         "switches": tier.switches} for tier in network_tiers(found)}  # fmt: skip
    return {"derived": {"accelerators": found.accelerator_count, "bisection_bandwidth": bisection(found), **tiers}}


@app.command("scenario")
@takes_scenario
def scenario(flags: ScenarioFlags, output: FormatOption = Format.table) -> None:
    """Show a scenario as it would run: every name looked up, every default filled in, with its hash."""
    from perfsim.spec.save import scenario_yaml

    resolved = flags.resolve()
    if output is Format.json:
        print_json({"scenario_hash": resolved.hash, **resolved.model_dump(mode="json")})
    elif output is Format.csv:
        flat = _flatten(resolved.model_dump(mode="json"))
        print_csv([{"field": key, "value": value} for key, value in flat.items()], columns=["field", "value"])
    else:
        typer.echo(f"# scenario hash {resolved.hash}\n{scenario_yaml(resolved, directory=Path.cwd())}", nl=False)


def _shape(part: Any) -> str:
    if part is None:
        return "none"
    values = _flatten(part.model_dump(exclude={"kind"}, exclude_none=True))
    return f"{part.kind} " + ", ".join(f"{key} {value}" for key, value in values.items() if value is not False)


def _sourced(found: Any) -> list[dict[str, Any]]:
    """One row per value with its source beside it, of what a cluster or node consists of too."""
    facts = {path: fact.model_dump() for path, fact in found.sources.items()}
    values = found.model_dump(mode="json", exclude={"sources", "accelerator", "node"})
    rows = [{"field": key, "value": value, **facts.get(key, {})} for key, value in _flatten(values).items()]
    for part in ("node", "accelerator"):
        if hasattr(found, part):
            rows += [{**row, "field": f"{part}.{row['field']}"} for row in _sourced(getattr(found, part))]
    return rows


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _reference(row: dict[str, Any], sources: list[str]) -> str:
    if "source" not in row:
        return ""
    return f"[{sources.index(row['source']) + 1}]" + ("" if row["verified"] else " ?")


def _readable(field: str, value: Any) -> str:
    from perfsim.report.format import human, significant

    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    parts = field.split(".")
    unit = next((unit for name, unit in _UNITS if any(part.endswith(name) for part in parts[-2:])), "")
    if unit == "bytes":
        fits = [(size, name) for size, name in _BINARY if value % size == 0 and 0 < value < 10_000 * size]
        size, name = fits[0] if fits else (0, "")
        return f"{value / size:,.0f} {name}" if size else human(value, unit)
    if unit == "FLOP/s":
        return f"{significant(value / 1e12, 4)} TFLOP/s"
    if unit == "bytes/s":
        return f"{significant(value / 1e9, 4)} GB/s"
    if unit == "Hz":
        return f"{value / 1e6:,.0f} MHz"
    if unit == "USD":
        return f"${value:.2f}"
    return human(value, unit) if unit else f"{value:,}" if "year" not in field else str(value)
