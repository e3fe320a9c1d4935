"""The report: its split covers every table, its numbers are the outcomes', its sections replace each other, and no
predicted prefill beats the speed of light."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from perfsim.errors import InputError
from perfsim.spec import catalog
from perfsim.spec.load import find_calibration
from validation.compare.outcome import Outcome, Values, summary
from validation.compare.table import Table
from validation.report import cli, headline, long_prefill, peers, plots, store
from validation.report.entries import entries
from validation.report.filled import filled
from validation.report.markdown import error, percent
from validation.report.sections import sections
from validation.report.served import coarse, summarised
from validation.report.split import roles, split
from validation.report.twins import twins, with_twins

SERVING = {
    "aic_silicon_sample", "inferencex_dsr1", "inferencex_token_position", "isim_vllm_experiments",
    "isim_vllm_requests", "llmservingsim_vllm_requests", "llmservingsim_vllm_timeseries", "mlperf_inference_llm",
    "splitwise_perf_model",
}  # fmt: skip
NO_LICENCE = {"isim_vllm_experiments", "isim_vllm_requests", "inferencex_dsr1", "mlperf_inference_llm"}


def test_the_split_covers_every_table_and_shows_no_values_of_those_without_a_licence() -> None:
    assert set(split().tables) == SERVING
    for stem, listed in split().tables.items():
        assert (listed.publish == "residuals") == (stem in NO_LICENCE)
        if listed.publish == "residuals":
            assert listed.run is None
            assert all(plot.kind == "residuals" for plot in listed.plots)
        for target in listed.targets:
            assert target.metric in listed.metrics
            assert not target.subset or target.subset in listed.subsets
            assert (target.subset or "all") in listed.headline
        assert not listed.rules[-1].where  # the last rule takes what is left


def stages() -> tuple[Table, Outcome]:
    data = pa.table({"hardware": ["H100", "H100", "A100"], "overloaded": [False, True, False],
                     "stage_index": [-1, 0, -1], "model": ["a", "a", "b"], "workload": ["x"] * 3, "tp": [1, 1, 2],
                     "cpu_offload": [False] * 3, "max_num_batched_tokens": [2048] * 3})  # fmt: skip
    measured, predicted = np.array([10.0, 10.0, 10.0]), np.array([11.0, 12.0, 13.0])
    nothing = np.full(3, np.nan)
    values = Values(np.arange(3), measured, predicted, nothing, nothing)
    return Table(Path("stages.parquet"), data), Outcome([None] * 3, {"tpot_derived_ms": values})


def test_rows_get_the_role_of_the_first_rule_that_takes_them() -> None:
    table, outcome = stages()
    listed = split().tables["isim_vllm_experiments"]
    assert roles(table, listed).tolist() == ["fitted", "kept out", "kept out"]
    found = summarised(table, outcome, listed)
    assert found["roles"]["fitted"]["tpot_derived_ms"]["mape_mean"] == pytest.approx(0.1)
    assert found["roles"]["kept out"]["tpot_derived_ms"]["mape_mean"] == pytest.approx(0.25)
    assert found["subsets"]["whole runs"]["kept out"]["tpot_derived_ms"]["n"] == 1
    with pytest.raises(InputError, match="no column 'hardware'"):
        roles(Table(table.path, table.data.drop(["hardware"])), listed)


def test_the_headline_shows_the_outcomes() -> None:
    table, outcome = stages()
    found = summarised(table, outcome, split().tables["isim_vllm_experiments"])
    listed_entries = list(entries({"isim": found}))
    by_rows = {(one.rows, one.role): one for one in listed_entries}
    values = outcome.values["tpot_derived_ms"]
    assert by_rows["not overloaded", "fitted"].found == summary(values.take([0]))
    assert by_rows["not overloaded", "kept out"].found == summary(values.take([2]))
    assert by_rows["overloaded", "kept out"].found == summary(values.take([1]))
    left = {
        "leave one out": [
            {"section": "isim", "rows": "not overloaded", "metrics": {"tpot_derived_ms": summary(values.take([1]))}}
        ]
    }
    refitted = [one for one in entries({"isim": found, "left-out": left}) if one.role == "leave one out"]
    assert [one.found for one in refitted] == [summary(values.take([1]))]
    text = "\n".join(headline.render({"isim": found}))
    unseen, fitted = text.split("### Rows that coefficients were fitted to")
    assert "| not overloaded | kept out | TPOT mean | 1 | 30% | 30% | 30% | +30% | – | – |" in unseen
    assert "| not overloaded | fitted | TPOT mean | 1 | 10% | 10% | 10% | +10% | – | – |" in fitted
    assert "| not overloaded | kept out | TPOT mean | mean ≤ 4.0% | 30% | **missed** |" in fitted


def test_sections_replace_each_other_and_nothing_else() -> None:
    results = {"tables": {"a.parquet": "1" * 64}, "coefficients": "2" * 64}
    first, second = store.block("one", results, "first"), store.block("two", None, "second")
    report = f"# Title\n\n{first}\ntext between\n\n{second}"
    assert store.blocks(report) == {"one": first, "two": second}
    assert store.replaced(report, {"one": first, "two": second}) == report
    changed = store.replaced(report, {"one": store.block("one", results, "new")})
    assert changed == report.replace("\nfirst\n", "\nnew\n")
    assert store.replaced(changed, {"one": store.block("one", results, "new")}) == changed
    added = store.replaced(report, {"three": store.block("three", None, "third")})
    assert list(store.blocks(added)) == ["one", "two", "three"]
    assert f"table: a.parquet sha256: {'1' * 64}" in first
    assert store.replaced(added, {"three": store.block("three", None, "third")}) == added


def test_the_committed_report_is_made_of_the_stored_results() -> None:
    every = list(sections())
    assert cli.document(every) == cli.document(every)
    committed = store.blocks(cli.REPORT.read_text(encoding="utf-8"))
    assert set(committed) == {"headline", "peers", "budget", *(section.name for section in every)}
    for section in every:
        results = store.load(section.name)
        if results is not None:
            for table, digest in results["tables"].items():
                assert f"table: {table} sha256: {digest}" in committed[section.name]


RESULTS = {
    "isim": {
        "roles": {"kept out": {"tpot": {"mape_mean": 0.0412, "bias": 0.3, "n": 1234}}},
        "groups": [{"name": "a", "kind": "x y", "median": 0.1}, {"name": "a", "kind": "z", "median": 2.5}],
    }
}


@pytest.mark.parametrize(("place", "shown"), [
    ("isim > roles > kept out > tpot > mape_mean", "4.1%"), ("isim > roles > kept out > tpot > bias", "+30%"),
    ("isim > roles > kept out > tpot > n", "1,234"), ("isim > groups > name=a, kind=x y > median", "10%"),
    ("isim > groups > kind=z > median", "250%"),
])  # fmt: skip
def test_figures_of_hand_written_text_are_those_of_the_results(place: str, shown: str) -> None:
    assert filled(f"so {{{place}}} and\n{{{place}}}", RESULTS, source="x.md") == f"so {shown} and\n{shown}"


@pytest.mark.parametrize(("place", "message"), [
    ("isin > roles", "nothing called 'isin'; did you mean 'isim'?"),
    ("isim > roles > kept out > tpot > mape_maen", "nothing called 'mape_maen'; did you mean 'mape_mean'?"),
    ("isim > roles > kept out", "expected a number there; it goes on with tpot"),
    ("isim > groups > name=a > median", "expected one entry with name=a, found 2"),
])  # fmt: skip
def test_figures_that_no_section_has_are_named_with_their_line(place: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        filled(f"first\n{{{place}}}", RESULTS, source="x.md")
    assert str(error.value) == f"x.md, line 2: {{{place}}}: {message}"


def test_the_budget_states_the_figures_of_the_stored_results() -> None:
    budget = store.blocks(cli.document(list(sections())))["budget"]
    assert "{" not in budget
    overloaded = store.load("isim")["subsets"]["overloaded"]["kept out"]["e2e_mean_ms"]["bias"]
    assert f"| E2E {percent(overloaded, sign=True)}: the run was overloaded" in budget


def test_sections_without_data_run_on_committed_rows_only(tmp_path) -> None:
    runnable = {section.name for section in sections() if section.inputs(None) is not None}
    assert {"operators-slice", "collectives-slice", "silicon-slice", "long-prefills", "llmservingsim"} <= runnable
    assert not runnable & {"isim", "left-out", "isim-requests", "silicon", "inferencex", "mlperf", "operators"}
    for section in sections():
        assert all(path.is_file() for path in section.committed), section.name
        assert section.inputs(tmp_path) == section.inputs(None)  # a folder without tables
    with pytest.raises(InputError, match="no section 'opertors'; did you mean 'operators'"):
        cli.write(tmp_path / "REPORT.md", data=None, only=["opertors"])
    assert cli.main(["--data", str(tmp_path / "none")]) == 2


def test_a_report_is_written_where_it_is_asked_for(tmp_path) -> None:
    written = []
    for _ in range(2):
        assert cli.main(["--only", "collectives-slice", "--output", str(tmp_path / "REPORT.md")]) == 0
        written.append((tmp_path / "REPORT.md").read_bytes())
        written.append((tmp_path / "figures" / "collectives-slice.svg").read_bytes())
    assert written[:2] == written[2:]
    found = store.load("collectives-slice", folder=tmp_path / "report" / "results")
    assert found is not None
    assert found["rows"] > 1000
    text = written[0].decode()
    assert "### Collectives, committed rows" in text
    for name in store.blocks(text):
        assert f"(figures/{name}.svg)" not in text or (tmp_path / "figures" / f"{name}.svg").is_file()


@pytest.mark.parametrize(
    "name", ["llama-3.1-8b-instruct", "llama-3.1-70b-instruct", "qwen3-30b-a3b", "deepseek-v2-lite"]
)
@pytest.mark.parametrize("device", ["a100-80gb-sxm", "h100-80gb-sxm", "b200-180gb-sxm", "l40s-48gb"])
def test_no_prefill_beats_the_speed_of_light(name: str, device: str) -> None:
    model, node = catalog.model(name), catalog.node(device)
    calibration = find_calibration(accelerator=device, engine="vllm")
    before = 0.0
    for tokens in (1, 100, 1024, 32768, 1 << 20, 10_000_000):
        found = long_prefill.prefill(model, node, tokens=tokens, tp=4, chunk=8192, calibration=calibration)
        assert found.seconds >= found.bound
        assert found.seconds >= found.kernels_bound
        assert 0.0 < found.mfu < 1.0
        assert found.seconds > before
        before = found.seconds


def test_prompts_are_computed_in_whole() -> None:
    assert long_prefill.chunks_of(20_000, 8192) == [(8192, 0), (8192, 8192), (3616, 16384)]
    model = catalog.model("llama-3.1-8b-instruct")
    step = long_prefill.prefill_step(model, long_prefill.chunks_of(20_000, 8192))
    assert float(np.sum(step.prefill_pairs[0])) == 20_000 * 20_001 / 2
    lengths = [found.tokens for found in long_prefill.predictions() if found.model == model.name]
    assert lengths.count(1 << 20) == 3  # on each of the devices


def test_plots_are_whole_and_the_same_every_time() -> None:
    x = np.geomspace(1, 1e6, 1000)
    series = [plots.Series("one", x, x * 1.05), plots.Series("two <&>", x[:3], np.array([2.0, np.nan, 5.0]))]
    errors = [plots.Series("one", x, np.linspace(-5, 0.1, 1000))]
    panels = [plots.scatter("scatter", "s", series), plots.residuals("residuals", "size", errors)]
    text = plots.figure(panels, label="both")
    assert text == plots.figure(panels, label="both")
    root = ET.fromstring(text)  # noqa: S314 - written by ourselves
    dots = [path.get("d").count("M") for path in root.iter("{http://www.w3.org/2000/svg}path")]
    assert dots == [plots.MOST_POINTS, 2, plots.MOST_POINTS]
    assert "of 1000 beyond ±200%" in text
    assert "NaN" not in text
    assert "nan" not in text


def test_every_peer_has_a_source() -> None:
    text = "\n".join(peers.render(None, None))
    for who in ("BLIS trained-physics", "AIConfigurator", "LLMServingSim", "Vidur"):
        assert who in text
    content = peers.load_yaml(peers.FILE)
    assert all(
        entry["source"] and entry["checked"] in ("read", "claimed") for entry in content["runs"] + content["claims"]
    )


def test_rows_that_overheads_were_fitted_to_are_not_shown_as_unseen() -> None:
    """`validation.engines --write` fits closed loops of one replica; the split must say so once its files are there."""
    listed = split().tables["aic_silicon_sample"]
    table = Table(Path("x"), pa.table({"mode": ["agg"], "backend": ["vllm"]}))
    if (store.CALIBRATION / "engines" / "vllm.yaml").is_file():
        assert roles(table, listed).tolist() == ["fitted"]


def test_errors_of_rows_that_may_not_be_published_are_coarse() -> None:
    """One row's exact error and perfsim's own prediction would tell the measured value."""
    one, few, many = ({"n": n, "mape_mean": 0.023456} for n in (1, 9, 10))
    small = {"n": 9, "mape_mean": 0.02, "coarse": True}
    found = coarse({"a": {"x": one}, "b": {"x": few}, "c": {"x": many}, "rows": 10})
    assert found == {"b": {"x": small}, "c": {"x": many}, "rows": 10}
    assert (error(small, "mape_mean"), error(many, "mape_mean")) == ("2%", "2.3%")


def summarised_as(value: float, **more: object) -> dict[str, object]:
    whole = dict.fromkeys(("mape_mean", "mape_median", "mape_p90", "bias"), value)
    return {"n": 5, **whole, "coverage_90": None, "band_width_median": None, **more}


def target_rows(subsets: dict[str, object]) -> list[str]:
    isim = {"roles": {}, "subsets": subsets, "rows": 1, "expressible": 1, "reasons": {}, "groups": {}}
    lines = "\n".join(headline.render({"isim": isim})).partition("### Targets")[2].splitlines()
    return [line for line in lines if line.startswith("| isim ")]


def test_a_target_without_measured_values_is_listed_and_rounding_meets_none() -> None:
    """`requests_per_s, overloaded` has no measured value; 4% in whole percents may be 4.4%."""
    overloaded = {"kept out": {"e2e_mean_ms": summarised_as(0.9)}}
    rounded = {"kept out": {"e2e_mean_ms": summarised_as(0.04, coarse=True), "tpot_derived_ms": summarised_as(0.04)}}
    rows = target_rows({"overloaded": overloaded, "not overloaded": rounded})
    assert any("| overloaded | – | requests/s | mean ≤ 5.0% | – | **no data** |" in row for row in rows)
    assert any("| kept out | E2E mean | mean ≤ 4.0% | 4% | **missed** |" in row for row in rows)
    assert any("| kept out | TPOT mean | mean ≤ 4.0% | 4.0% | met |" in row for row in rows)
    of_table = len(split().tables["isim_vllm_experiments"].targets)
    assert sum("≤" in row for row in rows) == of_table
    assert sum("not run yet" in row for row in target_rows({})) == of_table


def test_operator_targets_say_how_many_curves_keep_them() -> None:
    curve = {"kind": "gemm", "device": "d", "backend": "b", "format": "f"}
    curves = [{**curve, "held_out": {"n": 9, "median": value}} for value in (0.03, 0.04, 0.2)]
    cells = [{"kind": "gemm", "name": name, "median": value} for name, value in (("x", 0.1), ("y", 0.3))]
    middle = {"rows": 27, "groups": 3, "median": 0.04, "p90": 0.1}
    results = {
        "rows": 27, "summary": {"held_out": {"gemm": middle}}, "curves": curves,
        "left_out": {"device": {"gemm": {**middle, "median": 0.2}}}, "left_out_groups": {"device": cells},
        "pooled": {"held_out": {"gemm": {"rows": 27, "median": 0.07}}}, "ranges": {"gemm": {"rows": 108, "inside": 27}},
    }  # fmt: skip
    text = "\n".join(headline.render({"operators": results}))
    assert "| products | median of curves ≤ 5.0% | 4.0% | met in the median (2 of 3 curves keep it) |" in text
    assert "| products | median of devices ≤ 12% | 20% | **missed** (1 of 2 devices keep it) |" in text
    assert "| products | shapes not fitted | 1 of 3 curves above 5.0% | – | 4.0% | 7.0% | 25% |" in text
    assert "| products | device left out | 1 of 2 devices above 12% | y 30% | 20% | – | – |" in text


def test_runs_that_another_table_was_fitted_with_have_a_role_of_their_own() -> None:
    row = {"hardware": "b200", "framework": "sglang", "disagg": False, "isl": 1024, "osl": 1024, "conc": 4,
           "date": "2026-01-14", "mean_tpot": 0.0087}  # fmt: skip
    there = {"system": "b200_sxm", "backend": "sglang", "mode": "agg", "isl": 1024, "osl": 1024, "concurrency": 4.0,
             "measured": "2026-01-14", "silicon_tpot_ms": 8.7001}  # fmt: skip
    apart = {**row, "disagg": True, "framework": "dynamo-trt"}
    rows = [row, {**row, "mean_tpot": 0.0088}, {**row, "date": "2026-01-15"}, {**row, "mean_tpot": None}, apart,
            {**row, "conc": 8}]  # fmt: skip
    others = [there, {**there, "mode": "disagg", "backend": "trtllm"}]
    assert twins(rows, others) == [[0], [], [], [0], [1], []]
    table, other = (Table(Path("x"), pa.Table.from_pylist(each)) for each in (rows, others))
    listed = split().tables["inferencex_dsr1"]
    found, counts = with_twins(roles(table, listed), table, other, listed)
    seen = "fitted in another table"
    assert found.tolist() == [seen, "kept out", "kept out", seen, "kept out", "kept out"]
    assert counts == {"by time": 2, "by load": 1, "fitted": 2, "kept out": 1}
