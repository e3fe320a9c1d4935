"""Every mistake a user can make ends as one line on standard error and an exit code, never as a traceback."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perfsim.cli.main import main

Run = Callable[..., tuple[int, str, str]]

GOOD = "arrival_s,prompt_tokens,output_tokens\n0.0,100,5\n0.5,100,5\n"
SMALL = [
    "--model", "llama-2-7b-hf", "--hardware", "a100-80gb-sxm", "--set", "workload.num_requests=10",
]  # fmt: skip
SCENARIO = """\
model: llama-2-7b-hf
hardware: a100-80gb-sxm
workload:
  kind: synthetic
  num_requests: 10
  arrivals: {kind: poisson, rate: 1}
  prompt: {kind: fixed, tokens: 100}
  output: {kind: fixed, tokens: 10}
"""
# Nine levels of nine: 387,420,489 strings if aliases were followed.
BOMB = "a0: &a0 x\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 10)
)  # fmt: skip


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def call(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(argv)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def refused(run: Run, *argv: str, code: int = 2) -> str:
    """The one line that a refused command printed."""
    returned, out, err = run(*argv)
    assert returned == code, err
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert len(err) < 500
    return err


def parquet(**columns: list[object]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("model:", "modle:", "unknown key 'modle'; did you mean 'model'?"),
        ("rate: 1", "rate: 1, rte: 2", "workload.arrivals.rte: unknown key 'rte'; did you mean 'rate'?"),
        ("rate: 1", "rate: 5GB", "workload.arrivals.rate: expected a number, got '5GB'"),
        ("rate: 1", "rate: -1", "workload.arrivals.rate: expected a number greater than 0, got -1"),
        ("rate: 1", "rate: .nan", "line 6: expected a finite number, got '.nan'"),
        ("rate: 1", "rate: .inf", "line 6: expected a finite number, got '.inf'"),
        ("rate: 1", "rate: 1e300", "workload.arrivals.rate: expected a number of at most 1000000000"),
        ("rate: 1", "rate: 1e400", "line 6: '1e400' is too large for a number"),
        ("tokens: 100", "tokens: " + "9" * 5000, "line 7: a number of 5000 characters"),
        ("tokens: 100", "tokens: " + "9" * 30, "workload.prompt.tokens: expected a number of at most"),
        ("num_requests: 10", "num_requests: 1.5", "workload.num_requests: expected an integer, got 1.5"),
        ("model: llama-2-7b-hf", "model: lama-2-7b-hf", "unknown model 'lama-2-7b-hf'; did you mean 'llama-2-7b-hf'?"),
        ("model: llama-2-7b-hf", "model: ./absent.json", "absent.json"),
        ("a100-80gb-sxm", "a100-80gb-smx", "did you mean 'a100-80gb-sxm'?"),
        ("model: llama-2-7b-hf", "model: !!python/object/apply:os.system [id]", "is not allowed"),
        ("model: llama-2-7b-hf", "model: &m llama\nname: *m", "anchors and aliases are not allowed"),
        ("model: llama-2-7b-hf", "model: llama-2-7b-hf\nmodel: x", "duplicate key 'model'"),
        ("model: llama-2-7b-hf", "model: [", "not valid YAML"),
        ("model: llama-2-7b-hf", "model: llama-2-7b-hf\nslo: {ttft: {p95: 500mb}}", "'mb' is not a unit of seconds"),
        ("model: llama-2-7b-hf", "model: llama-2-7b-hf\nslo: {tttft: {p95: 1s}}", "did you mean 'ttft'?"),
        ("model: llama-2-7b-hf", "model: llama-2-7b-hf\nengine: vlllm", "did you mean 'vllm'?"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_scenarios(run: Run, tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert SCENARIO.replace(old, new) != SCENARIO
    (tmp_path / "s.yaml").write_text(SCENARIO.replace(old, new, 1))
    assert expected in refused(run, "simulate", "s.yaml")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "s.yaml"),
        (b"- a\n- b\n", "expected a mapping"),
        (BOMB.encode(), "anchors and aliases are not allowed"),
        (b"[" * 100_000, "s.yaml"),
        (b"a: " + b"{a: " * 5_000, "s.yaml"),
        (b"x" * (1 << 21), "larger than"),
        (bytes(range(256)), "not a YAML file"),
        (b"\x7fELF\0\0\0\0", "not"),
        (parquet(a=[1, 2]), "not a YAML file"),
        ("name: \u2028".encode("utf-16"), "not a YAML file"),
    ],
    ids=["empty", "list", "bomb", "deep", "deeper", "big", "bytes", "elf", "parquet", "utf-16"],
)
def test_files_that_are_no_scenario(run: Run, tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "s.yaml").write_bytes(content)
    assert expected in refused(run, "simulate", "s.yaml")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["simulate", "absent.yaml"], "'absent.yaml' does not exist"),
        (["simulate", "."], "Is a directory"),
        (["simulate", "absent"], "unknown scenario 'absent'"),
        (["simulate", "a\nb\x1b[31m.yaml"], "does not exist"),
        (["simulate", *SMALL, "--set", "parallel.tp"], "--set: expected KEY=VALUE such as parallel.tp=8"),
        (["simulate", *SMALL, "--set", "paralel.tp=8"], "did you mean 'parallel'?"),
        (["simulate", *SMALL, "--set", "parallel.tp=[1,"], "not valid YAML"),
        (["simulate", *SMALL, "--set", "parallel.tp=!!python/name:os.system"], "is not allowed"),
        (["simulate", *SMALL, "--set", "parallel.tp=\x00"], "--set parallel.tp"),
        (["simulate", *SMALL, "--set", "workload.arrivals.rate=nan"], "expected a finite number"),
        (["simulate", *SMALL, "--slo", "ttft.p95"], "--slo: expected KEY=VALUE such as ttft.p95=500ms"),
        (["simulate", *SMALL, "--slo", "ttft.p95=500GB"], "--slo ttft.p95: 'GB' is not a unit of seconds"),
        (["simulate", *SMALL, "--slo", "ttft.p94=1s"], "expected one of mean, p50, p90, p95, p99"),
        (["simulate", *SMALL, "--tp", "-1"], "--tp: expected a number greater than 0, got -1"),
        (["simulate", *SMALL, "--tp", "3"], "expected a divisor of the 32 attention heads"),
        (["simulate", *SMALL, "--tp", "two"], "--tp"),
        (["simulate", *SMALL, "--seed", "-1"], "--seed: expected a number of at least 0, got -1"),
        (["simulate", *SMALL, "--engine", "vlm"], "did you mean 'vllm'?"),
        (["simulate", "--model", "no-such-model-at-all"], "unknown model"),
        (["simulate", "--hardware", "tpu-v9"], "tpu-v9"),
        (["simulate", "--trace", "absent.csv"], "absent.csv"),
        (["simulate", "--trace", "absent"], "unknown trace 'absent'"),
        (["simulate", "--modle", "x"], "--modle"),
        (["simulate", "--format", "xml"], "xml"),
        (["simulate", "one.yaml", "two.yaml"], "two.yaml"),
        (["simulate", "--model"], "--model"),
        (["simulte"], "simulte"),
        (["show"], "Missing command"),
        (["show", "model"], "Missing argument 'name'"),
        (["show", "model", "lama-2-7b-hf"], "did you mean 'llama-2-7b-hf'?"),
        (["show", "model", "absent.json"], "absent.json"),
        (["show", "hardware", "h100-80gb-sxn"], "did you mean 'h100-80gb-sxm'?"),
        (["show", "hardware", "nvlink4"], "did you mean 'nvlink-4'?"),
        (["list", "modles"], "modles"),
    ],
    ids=lambda value: " ".join(value)[-50:] if isinstance(value, list) else "",
)
def test_bad_command_lines(run: Run, argv: list[str], expected: str) -> None:
    assert expected in refused(run, *argv)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.csv", b"", "t.csv"),
        ("t.csv", GOOD.splitlines(keepends=True)[0].encode(), "empty trace"),
        ("t.csv", GOOD.replace("0.5,", "-1,").encode(), "t.csv"),
        ("t.csv", (GOOD + "0.1,10,10\n").encode(), "t.csv"),
        ("t.csv", GOOD.replace("0.5,", "nan,").encode(), "t.csv"),
        ("t.csv", GOOD.replace("0.5,", "1e999,").encode(), "t.csv"),
        ("t.csv", GOOD.replace("0.5,100,5", "0.5,100,0").encode(), "t.csv"),
        ("t.csv", GOOD.replace("0.5,100,5", "0.5,-100,5").encode(), "t.csv"),
        ("t.csv", GOOD.replace("0.5,100,5", "0.5,many,5").encode(), "t.csv"),
        ("t.csv", GOOD.replace("0.5,100,5", "0.5,100").encode(), "t.csv"),
        ("t.csv", GOOD.replace("prompt_tokens", "promt_tokens").encode(), "prompt_tokens"),
        ("t.csv", random.Random(0).randbytes(10_000), "t.csv"),
        ("t.csv", parquet(a=[1, 2]), "t.csv"),
        ("t.jsonl", b"{}\n", "t.jsonl"),
        ("t.jsonl", b"[1, 2\n", "t.jsonl"),
        ("t.parquet", b"", "t.parquet"),
        ("t.parquet", parquet(arrival_s=[0.0] * 1000, prompt_tokens=[1] * 1000, output_tokens=[1] * 1000)[:-200],
         "t.parquet"),
        ("t.parquet", b"PAR1" + bytes(100) + b"PAR1", "t.parquet"),
        ("t.parquet", parquet(arrival_s=[0.0], prompt_tokens=[1]), "output_tokens"),
        ("t.parquet", parquet(arrival_s=[1.0, 0.0], prompt_tokens=[1, 1], output_tokens=[1, 1]), "t.parquet"),
        ("t.parquet", parquet(arrival_s=[], prompt_tokens=[], output_tokens=[]), "t.parquet"),
        ("t.parquet", parquet(arrival_s=["a"], prompt_tokens=["b"], output_tokens=["c"]), "t.parquet"),
        ("t.parquet", parquet(arrival_s=[None], prompt_tokens=[1], output_tokens=[1]), "t.parquet"),
        ("t.xlsx", b"PK\3\4", "t.xlsx"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_bad_traces(run: Run, tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert expected in refused(run, "simulate", "--model", "llama-2-7b-hf", "--hardware", "a100-80gb-sxm",
                               "--trace", name)  # fmt: skip


def test_a_missing_trace_in_a_scenario(run: Run, tmp_path: Path) -> None:
    text = SCENARIO[: SCENARIO.index("workload")] + "workload: {kind: trace, trace: gone.csv}\n"
    (tmp_path / "s.yaml").write_text(text)
    assert "gone.csv" in refused(run, "simulate", "s.yaml")


def test_a_model_that_does_not_fit_names_what_binds(run: Run) -> None:
    err = refused(run, "simulate", *SMALL, "--model", "llama-3.1-70b-instruct", code=3)
    assert "llama-3.1-70b-instruct does not fit a100-80gb-sxm with tp=1" in err
    assert "(binding constraint: " in err


def test_too_few_gpus_name_what_binds(run: Run) -> None:
    assert "(binding constraint: accelerators)" in refused(run, "simulate", *SMALL, "--tp", "16", code=3)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "config.json"),
        (b"[]", "config.json"),
        (b"{}", "config.json"),
        (b'{"architectures": ["Nothing"]}', "Nothing"),
        (b"{" * 100_000, "config.json"),
        (bytes(range(256)), "config.json"),
        (b'{"architectures": ["LlamaForCausalLM"], "hidden_size": NaN}', "config.json"),
    ],
    ids=["empty", "list", "nothing", "unknown", "deep", "binary", "nan"],
)
def test_bad_model_files(run: Run, tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert expected in refused(run, "show", "model", "config.json")
    assert expected in refused(run, "simulate", "--model", "config.json")


def test_an_output_directory_that_cannot_be_one(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "--output: cannot write to 'file'" in refused(run, "simulate", *SMALL, "-o", "file")
    assert "--output: cannot write to 'file/below'" in refused(run, "simulate", *SMALL, "-o", "file/below")
    (tmp_path / "d" / "result.json").mkdir(parents=True)
    assert "is a directory" in refused(run, "simulate", *SMALL, "-o", "d")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_bad_data_path(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERFSIM_PATH", "/no/such/directory")
    assert "PERFSIM_PATH" in refused(run, "list", "models")
