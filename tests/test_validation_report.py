"""The report: its split covers every table, its numbers are the outcomes', its sections replace each other, and no
predicted prefill beats the speed of light."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perfsim.errors import InputError
from perfsim.spec import catalog
from perfsim.spec.load import find_calibration
from validation.compare.outcome import Outcome, Values, summary
from validation.compare.table import Table
from validation.engines import runs as engine_runs
from validation.engines.fit import Linear
from validation.engines.runs import Runs, loops_group, stages_group, without
from validation.report import cli, headline, left_out, long_prefill, peers, plots, store
from validation.report.filled import filled
from validation.report.markdown import percent
from validation.report.sections import sections
from validation.report.served import coarse, summarised
from validation.report.split import roles, split

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
    entries = list(headline.entries({"isim": found}))
    by_rows = {(one.rows, one.role): one for one in entries}
    values = outcome.values["tpot_derived_ms"]
    assert by_rows["not overloaded", "fitted"].found == summary(values.take([0]))
    assert by_rows["not overloaded", "kept out"].found == summary(values.take([2]))
    assert by_rows["overloaded", "kept out"].found == summary(values.take([1]))
    left = {
        "leave one out": [
            {"section": "isim", "rows": "not overloaded", "metrics": {"tpot_derived_ms": summary(values.take([1]))}}
        ]
    }
    refitted = [one for one in headline.entries({"isim": found, "left-out": left}) if one.role == "leave one out"]
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


TRUE = {"a": (5e-4, 7e-3), "b": (8e-4, 4e-3)}  # what made the runs of each model: a step's host time, the ingress


def made_up_runs() -> tuple[Runs, Linear]:
    """Two models of load tests with overheads of their own, and three groups of closed loops of two other engines."""
    generator = np.random.Generator(np.random.PCG64(1))
    stages = [stages_group(model) for model in TRUE for _ in range(12)]
    loops = [("trtllm", "h100_sxm"), ("sglang", "b200_sxm"), ("sglang", "h100_sxm")]
    group = np.array([*stages, *(loops_group(engine, "m", system) for engine, system in loops for _ in range(12))])
    metric = np.array([*(["tpot_derived_ms", "ttft_mean_ms"] * 12), *(["silicon_tpot_ms"] * 36)])
    engine = np.array([*(["vllm"] * 24), *(["trtllm"] * 12), *(["sglang"] * 24)])
    names = (("vllm", "step_host"), ("vllm", "ingress"), ("trtllm", "step_host"), ("sglang", "step_host"))
    size = len(group)
    slope = generator.uniform(500.0, 1500.0, (size, 4)) * np.stack([engine == name for name, _ in names], axis=1)
    start = np.array([1e-4, 5e-3, 1e-4, 1e-4])
    true = np.tile([0.0, 0.0, 2e-4, 3e-4], (size, 1))
    for model, overheads in TRUE.items():
        true[group == stages_group(model), :2] = overheads
    base = generator.uniform(10.0, 20.0, size)
    measured = base + (slope * (true - start)).sum(axis=1)
    table = Table(Path("x.parquet"), pa.table({"model": ["a", "a", "b"], "stage_index": [-1, 0, -1]}))
    runs = Runs(table, [(name, None) for name in engine[24:]], measured, engine, group, metric, {}, {})
    scale = np.array([2e-4, 1e-3, 2e-4, 2e-4])
    return runs, Linear(names, start, scale, base, slope, np.ones(size, dtype=bool))


def stand_in(monkeypatch, tmp_path, runs: Runs, linear: Linear) -> list[tuple[str, dict[str, float]]]:
    """Let the section run on these; the list gets the model and the overheads of every simulation."""
    asked = []

    def compare(table, *, solve):
        asked.append((table.texts("model")[0], dict(solve.keywords["engine"])))
        ones = np.full(len(table), 10.0)
        nothing = np.full(len(table), np.nan)
        values = Values(np.arange(len(table)), ones, ones * 1.1, nothing, nothing)
        return table, Outcome([None] * len(table), {"tpot_derived_ms": values})

    monkeypatch.setattr(left_out, "read", lambda _: runs)
    monkeypatch.setattr(left_out, "linearised", lambda *_: linear)
    monkeypatch.setattr(left_out, "compare_stages", compare)
    (tmp_path / "serving").mkdir()
    for stem in left_out.TABLES:
        (tmp_path / "serving" / f"{stem}.parquet").write_bytes(b"rows")
    return asked


def test_groups_left_out_are_predicted_by_the_fit_without_them(tmp_path, monkeypatch) -> None:
    asked = stand_in(monkeypatch, tmp_path, *made_up_runs())
    found = left_out.run(tmp_path)
    assert [model for model, _ in asked] == ["a", "b"]
    for (_, overheads), other in zip(asked, ("b", "a"), strict=True):  # each has what the other model alone tells
        assert (overheads["step_host"], overheads["ingress"]) == pytest.approx(TRUE[other], rel=1e-3)
    assert found["left_out"]["all"]["tpot_derived_ms"]["n"] == 3
    assert found["left_out"]["whole runs"]["tpot_derived_ms"]["mape_mean"] == pytest.approx(0.1)
    assert found["loops"]["SGLang"]["silicon_tpot_ms"]["mape_median"] < 1e-3
    assert set(found["tables"]) == {f"{stem}.parquet" for stem in left_out.TABLES}
    json.dumps(found, allow_nan=False)
    assert "| SGLang | sglang m h100_sxm | 12 | 0.0% | 0.0% |" in "\n".join(left_out.render(found))
    entries = [one for one in headline.entries({"left-out": found}) if one.role == "leave one out"]
    assert entries == []  # tables that were not run have no rows in the first table


def test_leaving_out_what_is_not_there_is_an_error(tmp_path, monkeypatch) -> None:
    runs, linear = made_up_runs()
    assert without(runs, linear.usable, stages_group("a")).tolist() == [False] * 12 + [True] * 48
    unusable = linear.usable & (runs.group != stages_group("a"))
    for usable, group in ((linear.usable, stages_group("c")), (unusable, stages_group("a"))):
        with pytest.raises(InputError, match=f"no usable run is in the group '{group}'"):
            without(runs, usable, group)
    with pytest.raises(InputError, match="nothing is left to fit"):
        without(runs, runs.group == stages_group("a"), stages_group("a"))
    renamed = np.char.replace(runs.group.astype(str), "vllm a", "a")
    stand_in(monkeypatch, tmp_path, replace(runs, group=renamed), linear)
    with pytest.raises(InputError, match="no usable run is in the group 'vllm a "):
        left_out.run(tmp_path)


def test_runs_are_in_the_groups_that_are_left_out(tmp_path, monkeypatch) -> None:
    """Of the reader itself: every model of its load tests, and every configuration of its loops, has a group."""
    loop = {"backend": "trtllm", "backend_version": "1.1", "model_path": "Qwen/Qwen3-32B", "system": "h200_sxm",
            "precision": "fp8", "mode": "agg", "tp_size": 1.0, "attention_dp_size": 1.0, "moe_ep_size": 1.0,
            "silicon_tpot_ms": 9.0, "concurrency": 8.0, "isl": 1024, "osl": 1024}  # fmt: skip
    stages = pa.table({"overloaded": [False, False, True], "hardware": ["H100"] * 3, "model": ["a", "b", "c"]})
    (tmp_path / "serving").mkdir()
    pq.write_table(stages, tmp_path / "serving" / f"{left_out.STAGES}.parquet")
    pq.write_table(pa.Table.from_pylist([loop]), tmp_path / "serving" / f"{left_out.LOOPS}.parquet")
    ones, nothing = np.ones(2), np.full(2, np.nan)
    values = {name: Values(np.arange(2), ones, ones, nothing, nothing) for name in engine_runs.STAGE_METRICS}
    monkeypatch.setattr(engine_runs, "compare_stages", lambda table, *, solve: (table, Outcome([None] * 2, values)))
    monkeypatch.setattr(engine_runs.silicon, "questions_of", lambda rows, _: ([None] * len(rows), []))
    monkeypatch.setattr(engine_runs.silicon, "question_of", lambda row: row)
    runs = engine_runs.read(tmp_path)
    usable = np.ones(len(runs.group), dtype=bool)
    assert runs.stages.texts("model").tolist() == ["a", "b"]
    assert [without(runs, usable, stages_group(model)).tolist() for model in ("a", "b")] == [
        [False, True, False, True, True], [True, False, True, False, True],
    ]  # fmt: skip
    own = without(runs, usable, loops_group("trtllm", "Qwen/Qwen3-32B", "h200_sxm"))
    assert own.tolist() == [True] * 4 + [False]


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
    one, many = {"n": 1, "bias": 0.123456}, {"n": 9, "bias": 0.123456}
    assert coarse({"a": {"x": one}, "b": {"x": many}, "rows": 10}) == {"b": {"x": {"n": 9, "bias": 0.12}}, "rows": 10}
