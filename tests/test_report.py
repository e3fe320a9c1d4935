"""The report page, the terminal table and the CSV."""

from __future__ import annotations

import csv
import io
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from metrics_data import aggregate, synthetic_result, toy_run
from rich.console import Console

from perfsim.metrics.aggregate import Aggregate
from perfsim.metrics.result import Result
from perfsim.report.format import axis_unit, human, significant, words
from perfsim.report.html import report_html, write_report
from perfsim.report.svg import linear_ticks, log_time_ticks
from perfsim.report.tables import rows, summary_table, to_csv
from perfsim.spec.policy import SLO


@pytest.fixture(scope="module")
def result() -> Result:
    return synthetic_result(aggregate(*toy_run(300, rate=6.0)))


@pytest.fixture(scope="module")
def empty() -> Result:
    total = Aggregate(slo=SLO(ttft={"p95": 1.0}), egress=0.0, kv_blocks=10, block_size=16)
    total.add_rejected({"longer than max_model_len": 4})
    return synthetic_result(total, breakdown={}, bound={}, memory={}, cost={}, energy={})


def terminal(result: Result) -> str:
    written = io.StringIO()
    Console(file=written, width=120, color_system=None).print(summary_table(result))
    return written.getvalue()


def test_report_is_one_small_offline_file(tmp_path: Path, result: Result) -> None:
    write_report(result, tmp_path / "report.html")
    data = (tmp_path / "report.html").read_bytes()
    assert len(data) < 300_000
    page = data.decode()
    addresses = re.findall(r"""(?:src|href|url|@import)\s*[=(]\s*["']?[^"'>\s]+""", page)
    assert addresses == []
    assert set(re.findall(r"https?://[^\"'\s<]+", page)) == {"http://www.w3.org/2000/svg"}


def test_report_is_the_same_in_two_processes(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from metrics_data import *; from perfsim.report.html import write_report\n"
        "result = synthetic_result(aggregate(*toy_run(60, rate=6.0)))\n"
        "write_report(result, sys.argv[2] + '.html'); Path(sys.argv[2] + '.json').write_text(result.to_json())\n"
    )
    for seed in ("1", "2"):
        command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path / seed)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed, "TZ": f"Etc/GMT+{seed}"})
    for kind in ("html", "json"):
        assert (tmp_path / f"1.{kind}").read_bytes() == (tmp_path / f"2.{kind}").read_bytes()


def test_figures_are_well_formed_and_inside_their_frames(result: Result) -> None:
    figures = re.findall(r"<svg.*?</svg>", report_html(result), flags=re.DOTALL)
    assert len(figures) == 8
    for figure in figures:
        root = ET.fromstring(figure)  # noqa: S314 - written by this package
        width, height = (float(size) for size in root.attrib["viewBox"].split()[2:])
        assert root.attrib["aria-label"]
        for element in root.iter():
            for name, limit in (
                ("x", width),
                ("x1", width),
                ("x2", width),
                ("cx", width),
                ("y", height),
                ("y2", height),
            ):
                assert -0.6 <= float(element.attrib.get(name, 0)) <= limit + 0.6, (root.attrib["aria-label"], name)


def test_headline_numbers_verdicts_and_origin_are_on_the_page(result: Result) -> None:
    page = report_html(result)
    for text in (human(result.metrics["ttft"]["p95"], "s"), human(result.cost["usd"], "USD"), "broken",
                 "Memory bandwidth", "first-guess coefficients", "calibration.engine.step_host",
                 result.scenario_hash, "max_num_seqs", "Llama-3.1-70B-Instruct", *result.warnings):  # fmt: skip
        assert text in page, text


def service(count: int, **changes: object) -> list[dict[str, object]]:
    """`count` replicas in two groups, as a cluster's result lists them."""
    return [
        {"name": f"{role}/{i}", "group": role, "role": role, "requests": 100 + 10 * i, "output_tokens": 5000 * i,
         "busy_fraction": 0.5, "mean_batch": 8.0 + i, "kv_peak_fraction": 0.25, "prefix_hit_rate": None,
         "preemptions": 0, "failures": i % 2, **changes}
        for role in ("prefill", "decode") for i in range(count // 2)
    ]  # fmt: skip


def deployed(result: Result, count: int, **changes: object) -> Result:
    fields = result.to_dict()
    groups = [{"name": role, "count": count // 2, "role": role, "hardware": None, "policy": None, "calibration": None,
               "parallel": {"tp": 4, "pp": 1, "dp": 2, "ep": 8} if role == "decode" else None}
              for role in ("prefill", "decode")]  # fmt: skip
    fields["scenario"]["deployment"] = {
        "groups": groups, "router": {"kind": "prefix_aware", "match_threshold": 0.3}, "autoscaling": None,
        "transfer": {"bandwidth": 50e9, "latency": None, "layerwise": True},
        "failures": {"mtbf": 7200.0, "repair": 60.0},
    }  # fmt: skip
    fields["metrics"]["transfers"] = {"count": 12, "bytes": 3e12, "mean_s": 0.04, "hit_rate": 0.125, "unknown": None}
    return Result(**{**fields, "replicas": service(count, **changes)})


def test_a_service_shows_its_replicas_its_groups_and_what_only_it_has(result: Result) -> None:
    page = report_html(deployed(result, 6))
    for text in ("48 × NVIDIA H100 SXM in 6 replicas", "3 decode replicas of 8 × NVIDIA H100 SXM (TP 4, DP 2, EP 8)",
                 "Prefix aware, match threshold 0.3", "50.0 GB/s per GPU, layer by layer", "mtbf 2.00 h, repair 60.0 s",
                 "decode: highest / mean 1.09", "<td>decode/2</td>", "Details of this service", "3.00 TB", "40.0 ms",
                 "12.5%"):  # fmt: skip
        assert text in page, text
    assert "Prefix hits" not in page, "a column that no replica fills"
    assert ">None<" not in page
    single = report_html(result)
    assert "<h2>Replicas" not in single
    assert "Details of this service" not in single
    assert "on 8 × NVIDIA H100 SXM<" in single


def test_load_bars_are_proportional_and_coloured_by_group(result: Result) -> None:
    page = report_html(deployed(result, 6))
    found = re.search(r'<svg[^>]*aria-label="Load per replica".*?</svg>', page, re.DOTALL)
    figure = ET.fromstring(found.group())  # noqa: S314 - written by this package
    bars = [element for element in figure.iter() if element.tag.endswith("rect")]
    assert len(bars) == 4 * 6
    requests = [float(bar.attrib["height"]) for bar in bars[:6]]
    assert requests[2] / requests[0] == pytest.approx(1.2, abs=0.01)
    assert len({bar.attrib["fill"] for bar in bars[:3]}) == 1
    assert bars[0].attrib["fill"] != bars[3].attrib["fill"]


def test_a_thousand_replicas_keep_the_page_small(result: Result) -> None:
    page = report_html(deployed(result, 1000))
    assert len(page) < 400_000
    assert "The first 200 of 1,000 replicas" in page


def test_idle_replicas_have_a_section_too(result: Result) -> None:
    nothing = dict.fromkeys(("requests", "output_tokens", "busy_fraction", "mean_batch", "kv_peak_fraction"), 0)
    assert "No replica did anything" in report_html(deployed(result, 4, **nothing))


def test_colours_are_named_once_for_light_and_once_for_dark(result: Result) -> None:
    page = report_html(deployed(result, 4))
    light, dark = re.findall(r":root\{(.*?)\}", page)
    names = [set(re.findall(r"(--[\w-]+):", block)) for block in (light, dark)]
    assert names[0] == names[1]
    assert set(re.findall(r"var\((--[\w-]+)\)", page)) <= names[0]
    body = page.split("</style>")[1].split("<script>")[0]
    assert not re.search(r"(?:fill|stroke|background|color)[:=]\W?#", body), "a colour that dark mode cannot change"


def test_facts_nobody_checked_are_listed_and_the_energy_is_drawn(result: Result) -> None:
    page = report_html(result)
    assert "Facts not checked against their source (2)" in page
    assert "<li>calibration.engine.step_host</li>" in page
    fields = result.to_dict()
    fields["provenance"]["unverified"] = []
    fields["energy"].update(gpu_idle_joules=1e6, gpu_dynamic_joules=3e6, host_joules=0.0)
    page = report_html(Result(**fields))
    assert "Every fact about the hardware was checked" in page
    assert "3.00 MJ · 75.0%" in page


def test_text_of_the_user_is_escaped(result: Result) -> None:
    nasty = "<script>alert(1)</script>"
    scenario = result.to_dict()["scenario"]
    scenario["model"]["hf_id"] = scenario["workload"]["trace"] = scenario["policy"]["block_size"] = nasty
    replicas = service(2, name=nasty, group=nasty, role=nasty)
    changed = {
        **result.to_dict(),
        "scenario": scenario,
        "warnings": [nasty],
        "bound": {nasty: 1.0},
        "replicas": replicas,
    }
    page = report_html(Result(**changed))
    assert nasty not in page
    assert page.count("<script>") == 1


def test_folders_of_a_trace_stay_out_of_the_page(result: Result) -> None:
    scenario = result.to_dict()["scenario"]
    scenario["workload"]["trace"] = "/srv/someone/private/trace.csv"
    page = report_html(Result(**{**result.to_dict(), "scenario": scenario}))
    assert "trace.csv" in page
    assert "someone" not in page


def test_a_run_without_requests_still_reports(empty: Result) -> None:
    page = report_html(empty)
    assert "no samples in this run" in page
    assert "nan" not in re.sub(r"<script>.*", "", page, flags=re.DOTALL).lower().replace("nanmean", "")
    assert "4 rejected" in page
    assert "no samples" in terminal(empty)


@pytest.mark.parametrize("bounds", [{"p50": 0.0}, {"p50": 1e-9}, {"p99": 1e6, "p50": 1e-3}])
def test_bounds_far_from_the_data_do_not_break_the_figures(bounds: dict[str, float]) -> None:
    slo = SLO(ttft=bounds, itl=bounds, e2e=bounds)
    page = report_html(synthetic_result(aggregate(*toy_run(20, rate=6.0), slo=slo)))
    assert page.count('class="limit') == 3 * len(bounds)


def test_terminal_table_shows_percentiles_verdicts_and_warnings(result: Result) -> None:
    text = terminal(result)
    for part in ("TTFT", "p99", human(result.metrics["tpot"]["p99"], "s"), "Bound by", "broken", "Warning: No calib",
                 "first guesses", human(result.energy["joules"], "J")):  # fmt: skip
        assert part in text, part


def test_csv_has_every_number_with_its_unit(result: Result, empty: Result) -> None:
    table = list(csv.reader(io.StringIO(to_csv(result))))
    assert table[0] == ["metric", "stat", "value", "unit"]
    assert len(table) == 1 + len(result.numbers())
    assert ["ttft", "p95", repr(result.metrics["ttft"]["p95"]), "s"] in table
    assert ("memory.weights", "", result.memory["weights"], "bytes") in rows(result)
    assert ("breakdown.linear", "", result.breakdown["linear"], "s") in rows(result)
    assert ["ttft", "p95", "", "s"] in list(csv.reader(io.StringIO(to_csv(empty))))


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.4123, "s", "412 ms"), (0.99996, "s", "1.00 s"), (0.0, "s", "0 s"), (1.5e-6, "s", "1.50 µs"),
        (179.6, "s", "2.99 min"), (7200.0, "s", "2.00 h"), (None, "s", "–"), (80e9, "bytes", "80.0 GB"),
        (0.615, "fraction", "61.5%"), (0.99974, "fraction", "99.97%"), (0.9999999, "fraction", "99.99%"),
        (1.0, "fraction", "100%"), (0.0002, "fraction", "0.020%"), (0.0, "fraction", "0%"), (0.83, "USD", "$0.830"),
        (1234.5, "USD", "$1,234.50"), (10_000, "requests", "10,000 requests"), (4600.0, "W", "4,600 W"),
        (0.0, "J", "0 J"), (5.34e6, "J", "5.34 MJ"), (0, "", "0"),
    ],
)  # fmt: skip
def test_numbers_for_people(value: float | None, unit: str, text: str) -> None:
    assert human(value, unit) == text


def test_words_and_units_of_axes() -> None:
    assert words("hbm_bandwidth") == "HBM bandwidth"
    assert words("attention_decode") == "Attention decode"
    assert significant(1234567.0) == "1,234,567"
    assert axis_unit("s", 0.2) == (1e-3, "ms")
    assert axis_unit("tokens/s", 5.0) == (1.0, "tokens/s")


def test_ticks_lie_inside_and_are_round() -> None:
    assert linear_ticks(0.0, 1.0, 5) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert linear_ticks(0.0, 19.3, 12) == pytest.approx([0, 2, 4, 6, 8, 10, 12, 14, 16, 18])
    assert log_time_ticks(0.02, 1.5) == pytest.approx([0.02, 0.05, 0.1, 0.2, 0.5, 1.0])
    assert log_time_ticks(10, 8000) == [10, 30, 60, 180, 600, 1800, 3600]
    for low, high in ((1e-9, 1e9), (1e-4, 1e4), (1.0, 100.0), (3000.0, 3e5)):
        ticks = log_time_ticks(low, high)
        assert ticks == sorted(ticks)
        assert 2 <= len(ticks) <= 8
        assert low * 0.99 <= ticks[0] <= ticks[-1] <= high * 1.01
