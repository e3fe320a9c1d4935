"""Bands as users meet them: in the scenario and its hash, behind flags, in tables and on pages."""

from __future__ import annotations

import json

import pytest
from test_uncertainty import scenario

from perfsim.cli.main import main
from perfsim.errors import InputError
from perfsim.run import estimate, quantify, simulate


def test_samples_are_part_of_the_scenario_and_its_hash() -> None:
    asked = scenario(60)
    first, drawn = simulate(asked, bands=True), simulate(asked, samples=3)
    stated = simulate(asked.model_copy(update={"samples": 3}))
    assert first.scenario_hash == asked.hash == simulate(asked).scenario_hash
    assert "samples" not in first.scenario
    assert drawn.scenario["samples"] == 3
    assert drawn.scenario_hash != first.scenario_hash
    assert drawn.to_json() == stated.to_json()
    assert asked.replace(samples=3).hash == drawn.scenario_hash


def test_flags(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["simulate", "default", "--set", "workload.num_requests=40"]
    assert main([*small, "--no-bands", "--format", "json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["bands"] == {}
    assert "not quantified" in content["provenance"]["uncertainty"]
    assert main([*small, "--no-bands"]) == 0
    assert "Bands: not quantified" in capsys.readouterr().out
    assert main([*small, "--samples", "4", "--no-bands"]) == 2
    assert "--no-bands" in capsys.readouterr().err
    assert main([*small, "--samples", "1"]) == 2
    assert "expected 2 to 100,000" in capsys.readouterr().err
    with pytest.raises(InputError, match="expected 2"):
        estimate(scenario(), samples=0)


def test_tables_and_pages_show_bands() -> None:
    from perfsim.report.format import human_band
    from perfsim.report.html import report_html
    from perfsim.report.tables import rows

    asked = scenario(60)
    result = quantify(simulate(asked), asked)
    band = human_band(result.bands["ttft.p95"], result.value("ttft.p95"), "s")
    assert band in report_html(result)
    assert "factors" in report_html(result)
    assert ("ttft", "p95_low", result.bands["ttft.p95"][0], "s") in rows(result)
    assert ("cost.usd", "high", result.bands["cost.usd"][1], "USD") in rows(result)
    assert human_band([0.1204, 0.2011], 0.156, "s") == "[120, 201]"
    assert human_band([0.571, 0.63], 0.615, "fraction") == "[57.1, 63.0]"
    assert human_band([1.5, None], 2.0, "s") == "[1.50, \N{INFINITY}]"
    assert human_band(None, 2.0, "s") == ""
