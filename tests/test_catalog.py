"""The name resolver: every spelling of a name, search order, and the nearest name when there is none."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from perfsim.errors import InputError
from perfsim.spec import catalog

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("name", "resolved"),
    [
        ("llama-2-7b-hf", "llama-2-7b-hf"),
        ("LLAMA-2-7B-HF", "llama-2-7b-hf"),
        ("meta-llama/Llama-2-7b-hf", "llama-2-7b-hf"),
        ("meta-llama/llama-2-7b-HF", "llama-2-7b-hf"),
        ("llama-2-7b", "llama-2-7b-hf"),
        ("llama-3.1-8b", "meta-llama--Meta-Llama-3.1-8B"),
        ("llama-3.1-70b", "meta-llama--Meta-Llama-3.1-70B"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b-instruct"),
        ("deepseek-ai/DeepSeek-V3", "deepseek-ai--DeepSeek-V3"),
        ("deepseek-ai--deepseek-v3", "deepseek-ai--DeepSeek-V3"),
        ("DeepSeek-V3", "deepseek-ai--DeepSeek-V3"),
        ("gpt-oss-20b", "openai--gpt-oss-20b"),
        ("mixtral-8x7b-v0.1", "mixtral-8x7b-v0.1"),
        ("mistralai--Mixtral-8x7B-v0.1", "mistralai--Mixtral-8x7B-v0.1"),
        ("mistralai/Mixtral-8x7B-v0.1", "mistralai--Mixtral-8x7B-v0.1"),
    ],
)
def test_model_names(name: str, resolved: str) -> None:
    assert catalog.model(name).name == resolved


def test_files_of_one_model_share_its_hugging_face_id() -> None:
    ids = {catalog.model(name).hf_id for name in ("mixtral-8x7b-v0.1", "mistralai--Mixtral-8x7B-v0.1")}
    assert ids == {"mistralai/Mixtral-8x7B-v0.1"}


@pytest.mark.parametrize(
    ("name", "node", "accelerator"),
    [
        ("h100-80gb-sxm", "dgx-h100", "h100-80gb-sxm"),
        ("H100-80GB-SXM", "dgx-h100", "h100-80gb-sxm"),
        ("dgx-h100", "dgx-h100", "h100-80gb-sxm"),
        ("a100-80gb-sxm", "dgx-a100", "a100-80gb-sxm"),
        ("l40s", "l40s-8x-pcie", "l40s-48gb"),
        ("rtx-4090", "rtx-4090-4x", "rtx-4090-24gb"),
        ("rtx-pro-6000", "rtx-pro-6000-8x-pcie", "rtx-pro-6000-blackwell-96gb"),
    ],
)
def test_hardware_names(name: str, node: str, accelerator: str) -> None:
    found = catalog.node(name)
    assert (found.name, found.accelerator.name) == (node, accelerator)


def test_every_alias_has_a_target() -> None:
    assert set(catalog.aliases("models").values()) <= set(catalog.list_models())
    assert set(catalog.aliases("hardware").values()) <= set(catalog.list_hardware())
    assert set(catalog.aliases("traces").values()) <= set(catalog.list_traces())


@pytest.mark.parametrize(
    ("call", "name", "expected"),
    [
        (catalog.model, "lama-2-7b-hf", "unknown model 'lama-2-7b-hf'; did you mean 'llama-2-7b-hf'?"),
        (catalog.node, "h100-80gb-sxn", "unknown hardware 'h100-80gb-sxn'; did you mean 'h100-80gb-sxm'?"),
        (catalog.node, "dgx-h10", "unknown hardware 'dgx-h10'; did you mean 'dgx-h100'?"),
        (catalog.hardware, "nvlink4", "unknown hardware 'nvlink4'; did you mean 'nvlink-4'?"),
        (catalog.hardware, "nvme-gen9", "unknown hardware 'nvme-gen9'; did you mean 'nvme-gen6'?"),
        (catalog.hardware, "gb200-nvl72-9x", "unknown hardware 'gb200-nvl72-9x'; did you mean 'gb200-nvl72-8x'?"),
        (catalog.accelerator, "b20", "unknown accelerator 'b20'; did you mean 'b200'?"),
    ],
)  # fmt: skip
def test_unknown_names_get_the_nearest(call: Callable[[str], object], name: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        call(name)
    assert str(caught.value) == expected


def test_nothing_near_lists_what_is_known() -> None:
    with pytest.raises(InputError, match=r"known: .* in all"):
        catalog.model("#" * 3000)


def test_paths(tmp_path: Path) -> None:
    copy = tmp_path / "mine.json"
    shutil.copy(ROOT / "workloads/models/llama-2-7b-hf.json", copy)
    assert catalog.model(copy).name == "mine"
    assert catalog.model(str(copy)).hf_id is None
    with pytest.raises(InputError, match="does not exist"):
        catalog.model(tmp_path / "none.json")


def test_a_node_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    text = (ROOT / "hardware/nodes/dgx-h100.yaml").read_text()
    path.write_text(text.replace("name: dgx-h100", "name: two").replace("{value: 8, source: basepod}", "2"))
    node = catalog.node(str(path))
    assert (node.name, node.accelerator_count, node.accelerator.name) == ("two", 2, "h100-80gb-sxm")
    assert "accelerator_count" not in node.sources
    with pytest.raises(InputError, match="expected a node"):
        catalog.node(ROOT / "hardware/accelerators/h100-80gb-sxm.yaml")


def test_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "workloads" / "traces"
    folder.mkdir(parents=True)
    (folder / "Mine_Trace.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,1,1\n")
    (folder / "Mine_Trace.md").write_text("a sidecar is not a trace")
    monkeypatch.setenv("PERFSIM_PATH", str(tmp_path))
    assert "Mine_Trace" in catalog.list_traces()
    assert catalog.trace_path("mine_trace") == folder / "Mine_Trace.csv"
    assert catalog.trace_path(folder / "Mine_Trace.csv") == folder / "Mine_Trace.csv"
    for missing in ("none.csv", str(tmp_path / "none"), str(tmp_path), "x\0y.csv", "y" * 5000 + ".csv"):
        with pytest.raises(InputError, match="does not exist"):
            catalog.trace_path(missing)
    with pytest.raises(InputError, match="did you mean 'Mine_Trace'"):
        catalog.trace_path("mine_trac")


def test_search_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = tmp_path / "workloads" / "models"
    models.mkdir(parents=True)
    text = (ROOT / "workloads/models/llama-2-7b-hf.json").read_text()
    (models / "llama-2-7b-hf.json").write_text(text.replace('"num_hidden_layers": 32', '"num_hidden_layers": 3'))
    assert catalog.model("llama-2-7b-hf").num_hidden_layers == 32
    monkeypatch.setenv("PERFSIM_PATH", str(tmp_path))
    assert catalog.model("llama-2-7b-hf").num_hidden_layers == 3
    assert catalog.model("llama-2-70b-hf").num_hidden_layers == 80
    monkeypatch.setenv("PERFSIM_PATH", str(tmp_path / "none"))
    with pytest.raises(InputError, match="PERFSIM_PATH"):
        catalog.list_models()


def test_resolving_names_imports_nothing_heavy() -> None:
    code = (
        "import sys; from perfsim.spec import catalog; catalog.model('llama-2-7b-hf'); catalog.node('h100-80gb-sxm')\n"
        "sys.exit(any(name in sys.modules for name in ('numpy', 'pyarrow', 'pandas', 'plotly')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
