"""The report page: one self-contained HTML file, the same bytes for the same result, readable offline."""

from __future__ import annotations

from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from perfsim.metrics.definitions import LATENCIES, metric
from perfsim.report import figures, latency, replicas, scenario
from perfsim.report.format import human, human_band, words

if TYPE_CHECKING:
    from perfsim.metrics.result import Result

_LOAD = (
    "counts.requests", "counts.rejected", "counts.failed", "counts.prompt_tokens", "counts.output_tokens",
    "counts.preemptions",
    "throughput.requests_per_s", "throughput.prompt_tokens_per_s", "throughput.output_tokens_per_s",
    "batch.mean_sequences", "batch.max_sequences", "batch.mean_tokens", "queue.mean_waiting", "queue.max_waiting",
    "makespan_s",
)  # fmt: skip
_SHOWN_ELSEWHERE = frozenset((
    *LATENCIES, "throughput", "goodput", "slo", "counts", "rejected_for", "prefix_cache", "kv_cache", "batch", "queue",
    "percentile_method",
))  # fmt: skip


def write_report(result: Result, path: str | Path) -> None:
    """Write `report_html(result)` to `path`, UTF-8."""
    Path(path).write_text(report_html(result), encoding="utf-8", newline="\n")


def report_html(result: Result) -> str:
    """The report as HTML text: headline numbers, figures, scenario, provenance; no network, clock or path in it."""
    assets = resources.files("perfsim.report")
    style = assets.joinpath("report.css").read_text(encoding="utf-8")
    script = assets.joinpath("report.js").read_text(encoding="utf-8")
    title = scenario.title(result.scenario)
    body = "\n".join((
        _header(result, title),
        _warnings(result),
        _tiles(result),
        f"<p class=note>{escape(scenario.bands_note(result))}</p>",
        latency.section(result),
        f"<h2>The run over time</h2><div class=card>{figures.over_time(result)}</div>",
        replicas.section(result),
        _where(result),
        _more(result),
        _scenario(result),
        _footer(result),
    ))  # fmt: skip
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>perfsim: {escape(title)}</title>\n"
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _header(result: Result, title: str) -> str:
    badge = "<span class=badge>first-guess coefficients</span>" if scenario.first_guess(result) else ""
    return f"<header><h1>{escape(title)}{badge}</h1><p>{escape(scenario.subtitle(result))}</p></header>"


def _warnings(result: Result) -> str:
    if not result.warnings:
        return ""
    items = "".join(f"<li>{escape(warning)}</li>" for warning in result.warnings)
    return f"<section class=warnings><h3>Warnings</h3><ul>{items}</ul></section>"


def _tiles(result: Result) -> str:
    metrics = result.metrics
    counts, throughput, goodput = metrics["counts"], metrics["throughput"], metrics["goodput"]
    tiles = [_latency_tile(result, name) for name in ("ttft", "tpot", "e2e")]
    tiles.append(_tile(result, "throughput.output_tokens_per_s",
                       f"{human(throughput['requests_per_s'], 'requests/s')}"))  # fmt: skip
    if goodput["requests"] is None:
        tiles.append(_card("Goodput", "–", "no SLO on requests was given", metric("goodput.fraction").formula))
    else:
        note = f"{goodput['requests']:,} of {counts['requests']:,} requests met the SLO"
        tiles.append(_tile(result, "goodput.fraction", note))
    tiles.append(_tile(result, "prefix_cache.hit_rate", f"{human(counts['cached_tokens'], 'tokens')} not recomputed"))
    mean = human(metrics["kv_cache"]["occupancy_mean"], "fraction")
    tiles.append(_tile(result, "kv_cache.occupancy_peak", f"{mean} on average"))
    if result.bound:
        share, name = max((share, name) for name, share in result.bound.items())
        tiles.append(
            _card("Bound by", metric(f"bound.{name}").label, f"for {human(share, 'fraction')} of busy time", "")
        )
    for key, total in (("cost.usd_per_million_output_tokens", "cost.usd"), ("energy.joules_per_output_token",
                                                                           "energy.joules")):  # fmt: skip
        numbers = result.numbers()
        if key in numbers:
            tiles.append(_tile(result, key, f"{human(numbers.get(total), metric(total).unit)} for the run"))
    return f"<section class=tiles>{''.join(tiles)}</section>"


def _latency_tile(result: Result, name: str) -> str:
    values, definition = result.metrics[name], metric(name)
    note = f"p50 {human(values['p50'], 's')} · p99 {human(values['p99'], 's')}"
    band = human_band(result.bands.get(f"{name}.p95"), values["p95"], "s")
    return _card(f"{definition.label} p95", human(values["p95"], "s"), note, definition.formula, band=band)


def _tile(result: Result, key: str, note: str) -> str:
    definition, value = metric(key), result.numbers()[key]
    band = human_band(result.bands.get(key), value, definition.unit)
    return _card(definition.label, human(value, definition.unit), note, definition.formula, band=band)


def _card(name: str, value: str, note: str, formula: str, *, band: str = "") -> str:
    hint = f' title="{escape(formula)}"' if formula else ""
    shown = f" <small>{escape(band)}</small>" if band else ""
    return (
        f"<div class=tile{hint}><span class=name>{escape(name)}</span><b>{escape(value)}{shown}</b>"
        f"<span>{escape(note)}</span></div>"
    )


def _where(result: Result) -> str:
    numbers = result.numbers()
    left = (
        (
            "Where the mean replica's time went" if len(result.replicas) > 1 else "Where the time went",
            figures.breakdown(result),
        ),
        ("What bound the busy time", figures.bound(result)),
        ("Memory of each GPU", figures.memory(result)),
        ("Cost", _metric_table(result, tuple(key for key in numbers if key.startswith("cost.")))),
    )
    right = (
        ("Load", _metric_table(result, (*_LOAD, *(key for key in numbers if key.startswith("rejected_for."))))),
        (
            "Energy",
            _metric_table(result, tuple(key for key in numbers if key.startswith("energy."))) + figures.energy(result),
        ),
    )
    columns = "".join(
        f"<div class=column>{''.join(f'<div class=card><h3>{title}</h3>{body}</div>' for title, body in cards)}</div>"
        for cards in (left, right)
    )
    return f"<h2>Where time, memory and money went</h2><div class=grid>{columns}</div>"


def _more(result: Result) -> str:
    """Cards for what only some runs have: KV tiers and transfers, speculation, adapters, scaling, failures."""
    numbers = result.numbers()
    groups = [group for group in result.metrics if group not in _SHOWN_ELSEWHERE and isinstance(
        result.metrics[group], dict)]  # fmt: skip
    cards = []
    for group in groups:
        keys = tuple(key for key in numbers if key.startswith(f"{group}.") and numbers[key] is not None)
        if keys:
            cards.append(f"<div class=card><h3>{escape(words(group))}</h3>{_metric_table(result, keys)}</div>")
    return f"<h2>Details of this service</h2><div class=grid>{''.join(cards)}</div>" if cards else ""


def _metric_table(result: Result, keys: tuple[str, ...]) -> str:
    numbers, rows = result.numbers(), []
    for key in (key for key in keys if key in numbers):
        definition = metric(key)
        hint = f' title="{escape(definition.formula)}"' if definition.formula else ""
        label = f"<abbr{hint}>{escape(definition.label)}</abbr>" if hint else escape(definition.label)
        band = human_band(result.bands.get(key), numbers[key], definition.unit)
        extra = f" <small>{escape(band)}</small>" if band else ""
        rows.append(f"<tr><td>{label}</td><td>{escape(human(numbers[key], definition.unit))}{extra}</td></tr>")
    return f"<table>{''.join(rows)}</table>" if rows else "<p class=empty>Nothing recorded</p>"


def _scenario(result: Result) -> str:
    columns: dict[bool, list[str]] = {False: [], True: []}
    for title, rows in scenario.sections(result.scenario):
        card = f"<div class=card><h3>{escape(title)}</h3>{_facts(rows)}</div>"
        columns[title in {"Serving policy", "Workload"}].append(card)
    body = "".join(f"<div class=column>{''.join(cards)}</div>" for cards in columns.values())
    return f"<h2>Scenario</h2><div class=grid>{body}</div>{_provenance(result)}"


def _provenance(result: Result) -> str:
    """Where coefficients come from, and every fact that nobody has checked against its source."""
    facts = {key: value for key, value in result.provenance.items() if key != "unverified"}
    unverified, doubts = result.provenance.get("unverified"), ""
    if unverified:
        items = "".join(f"<li>{escape(str(fact))}</li>" for fact in unverified)
        title = f"Facts not checked against their source ({len(unverified)})"
        doubts = f'<h3 style="margin-top:16px">{title}</h3><ul class=plain>{items}</ul>'
    elif unverified is not None:
        doubts = "<p class=note>Every fact about the hardware was checked against its source.</p>"
    return f"<h2>Where the numbers come from</h2><div class=card>{_facts(scenario.flatten(facts))}{doubts}</div>"


def _facts(rows: list[tuple[str, str]]) -> str:
    body = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table class=facts>{body}</table>" if body else "<p class=empty>Nothing recorded</p>"


def _footer(result: Result) -> str:
    run = result.simulation
    return (
        f"<footer>perfsim {escape(result.perfsim_version)} · scenario <code>{escape(result.scenario_hash)}</code> · "
        f"seed {result.seed} · {run['requests']:,} requests, {run['steps']:,} engine steps in "
        f"{run['segments']:,} segments</footer>"
    )
