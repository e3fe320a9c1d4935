"""Every broken trace ends in one line that says which file, which record, which column, and what was expected."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perfsim import traffic
from perfsim.errors import InputError
from perfsim.spec.workload import TraceWorkload
from perfsim.traffic import read_trace

TRACES = Path(__file__).parents[1] / "workloads" / "traces"
HEADER = "arrival_s,prompt_tokens,output_tokens\n"
WHOLE = r"expected a whole number from 1 to 100000000, got "


def failure(path: Path) -> str:
    """The message that reading `path` to its end ends with, checked to be one line that begins with the file."""
    with pytest.raises(InputError) as caught:
        list(read_trace(path))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    assert len(message) < len(str(path)) + 400
    return message[len(str(path)) :]


# What is wrong in row 2 of a file: the three cells, and what the message says about them.
BAD_ROWS = [
    (("1", "0", "5"), f"column 'prompt_tokens': {WHOLE}0"),
    (("1", "-7", "5"), f"column 'prompt_tokens': {WHOLE}-7"),
    (("1", "2.5", "5"), f"column 'prompt_tokens': {WHOLE}2.5"),
    (("1", "100000001", "5"), f"column 'prompt_tokens': {WHOLE}100000001"),
    (("1", "1e300", "5"), f"column 'prompt_tokens': {WHOLE}1e+300"),
    (("1", "5", "0"), f"column 'output_tokens': {WHOLE}0"),
    (("1", "5", "NaN"), f"column 'output_tokens': {WHOLE}NaN or an empty value"),
    (("-1", "5", "5"), "column 'arrival_s': expected seconds from the start of the trace, 0 to 1e+09, got -1"),
    (("NaN", "5", "5"), "column 'arrival_s': expected seconds from the start of the trace, 0 to 1e+09, got NaN"),
    (
        ("1700000000.5", "5", "5"),
        "column 'arrival_s': expected seconds from the start of the trace, 0 to 1e+09, got 1700000000.5",
    ),
    (("0.25", "5", "5"), "column 'arrival_s': arrivals must not decrease, but 0.25 s follows 0.5 s"),
]


@pytest.mark.parametrize(("cells", "expected"), BAD_ROWS)
def test_bad_numbers(tmp_path, cells, expected):
    csv = tmp_path / "x.csv"
    csv.write_text(HEADER + "0.5,1,1\n" + ",".join(cells) + "\n9,1,1\n")
    assert f": row 2, {expected}" in failure(csv)
    jsonl = tmp_path / "x.jsonl"
    names = HEADER.strip().split(",")
    second = ", ".join(f'"{name}": {cell}' for name, cell in zip(names, cells, strict=True))
    jsonl.write_text('{"arrival_s": 0.5, "prompt_tokens": 1, "output_tokens": 1}\n{' + second + "}\n")
    assert failure(jsonl) == failure(csv).replace("row", "line", 1)
    parquet = tmp_path / "x.parquet"
    columns = zip(names, ("0.5", "1", "1"), cells, strict=True)
    pq.write_table(pa.table({name: [float(first), float(cell)] for name, first, cell in columns}), parquet)
    assert failure(parquet) == failure(csv)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "empty trace; expected a header line"),
        ("\n\n\n", "empty trace"),
        (HEADER, "empty trace; expected at least one request"),
        (HEADER.strip(), "empty trace; expected at least one request"),
        (HEADER + "\n" * 200, "empty trace; expected at least one request"),
        ("\n" + HEADER + "0,1,1\n", "line 1 is blank; expected the header arrival_s,prompt_tokens,output_tokens"),
        ("0,1,1\n1,2,2\n", "unknown column '0'"),
        (
            "arrival_s,promt_tokens,output_tokens\n0,1,1\n",
            "unknown column 'promt_tokens'; did you mean 'prompt_tokens'?",
        ),
        (
            "arrival_s;prompt_tokens;output_tokens\n0;1;1\n",
            "expected arrival_s, prompt_tokens, output_tokens (optional",
        ),
        ("arrival_s,prompt_tokens\n0,1\n", "missing column 'output_tokens'; found 'arrival_s', 'prompt_tokens'"),
        ("TIMESTAMP,ContextTokens\n0,1\n", "missing column 'GeneratedTokens'"),
        ("arrival_s,prompt_tokens,output_tokens,prompt_tokens\n0,1,1,1\n", "column 'prompt_tokens' appears twice"),
        (HEADER + "0,1,1\n0,1\n", "row 2: expected 3 columns (arrival_s, prompt_tokens, output_tokens), got 2"),
        (HEADER + "0,1,1\n\n0,1,1,1\n", "row 2: expected 3 columns"),
        (HEADER + "0,1,1\n0,x,1\n", "row 2, column 'prompt_tokens': expected a number, got 'x'"),
        (HEADER + "0,1,1\n0,1_000,1\n", "row 2, column 'prompt_tokens': expected a number, got '1_000'"),
        (HEADER + "0,1,1\n0,NA,1\n", "row 2, column 'prompt_tokens': expected a number, got 'NA'"),
        (HEADER + "0,1,1\n,1,1\n", "row 2, column 'arrival_s': expected seconds"),
        (HEADER + "0,1,1\ninf,1,1\n", "row 2, column 'arrival_s': expected seconds"),
        (HEADER + '0,1,1\n0,"1,1\n', "row 2: expected 3 columns"),
        (HEADER + "0,1,1\n0," + "9" * 5000 + ",1\n", f"row 2, column 'prompt_tokens': {WHOLE}inf"),
        (HEADER + "0,1,1\n0,1," + "a" * 9000 + "\n", "row 2, column 'output_tokens': expected a number, got 'aaaa"),
        (
            "arrival_s,prompt_tokens,output_tokens,priority\n0,1,1,1\n0,1,1,0.5\n",
            "row 2, column 'priority': expected a w",
        ),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,1,1\n16/11/23,1,1\n",
            "expected a date and time",
        ),
        ("arrival_s,prompt_tokens,output_tokens,hash_block_ids\n0,1,1,0\n", "missing column 'hash_block_tokens'"),
    ],
)
def test_bad_csv(tmp_path, text, expected):
    path = tmp_path / "x.csv"
    path.write_bytes(text.encode())
    assert expected in failure(path)


HASHED = "arrival_s,prompt_tokens,output_tokens,hash_block_ids,hash_block_tokens\n0,16,1,5,16\n"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("0,17,1,5,16", "column 'hash_block_ids': expected 2 block ids for 17 prompt tokens in blocks of 16, got 1"),
        ("0,16,1,5 6,16", "column 'hash_block_ids': expected 1 block ids for 16 prompt tokens in blocks of 16, got 2"),
        ("0,16,1,a,16", "column 'hash_block_ids': expected whole numbers separated by spaces"),
        ("0,16,1,5,32", "column 'hash_block_tokens': expected 16 as in the rows before, got 32"),
        ("0,16,1,5,", f"column 'hash_block_tokens': {WHOLE}NaN"),
        ("0,16,1,5,0", f"column 'hash_block_tokens': {WHOLE}0"),
    ],
)
def test_bad_block_ids(tmp_path, row, expected):
    path = tmp_path / "x.csv"
    path.write_text(HASHED + row + "\n")
    assert f": row 2, {expected}" in failure(path)


GOOD = '{"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1}\n'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "empty trace"),
        ("\n \n", "empty trace"),
        (GOOD + "{", "line 2: expected a JSON object, got '{'"),
        (GOOD + "\n[1, 2]\n", "line 3: expected a JSON object, got '[1, 2]'"),
        (GOOD + "7\n", "line 2: expected a JSON object, got '7'"),
        (GOOD + GOOD.strip() * 2, "line 2: expected a JSON object"),
        (GOOD + "[" * 100_000 + "\n", "line 2: expected a JSON object, got '[[["),
        (GOOD + GOOD.replace("1,", "1" * 5000 + ","), "line 2: expected a JSON object"),
        (GOOD + GOOD.replace("1,", "1" * 4000 + ","), f"line 2, column 'prompt_tokens': {WHOLE}inf"),
        (GOOD + GOOD.replace("1,", '"1",'), "line 2, column 'prompt_tokens': expected a number, got '1'"),
        (GOOD + GOOD.replace("1,", "true,"), "line 2, column 'prompt_tokens': expected a number, got True"),
        (GOOD + GOOD.replace("1,", "null,"), f"line 2, column 'prompt_tokens': {WHOLE}NaN or an empty value"),
        (
            GOOD + GOOD.replace("prompt_tokens", "prompt"),
            "line 2: unknown column 'prompt'; did you mean 'prompt_tokens'?",
        ),
        (GOOD + '{"arrival_s": 0, "prompt_tokens": 1}', "line 2: missing column 'output_tokens'"),
        (
            GOOD + '{"timestamp": 0, "input_length": 1, "output_length": 1}',
            "line 2: expected the same keys as the lines",
        ),
        (
            '{"TIMESTAMP": 0, "ContextTokens": 1, "GeneratedTokens": 1}',
            "line 1: Azure's dated columns are read from CSV",
        ),
        (
            '{"timestamp": 0, "input_length": 1024, "output_length": 1, "hash_ids": [1, 2, 3]}',
            "line 1, column 'hash_ids': expected 2 block ids for 1024 prompt tokens in blocks of 512, got 3",
        ),
        (
            '{"timestamp": 0, "input_length": 9, "output_length": 1, "hash_ids": [1.5]}',
            "line 1, column 'hash_ids': expected a list of whole numbers, got [1.5]",
        ),
        (
            '{"timestamp": 2500, "input_length": 9, "output_length": 1}\n\n'
            '{"timestamp": 1000, "input_length": 9, "output_length": 1}',
            "line 3, column 'timestamp': arrivals must not decrease, but 1 s follows 2.5 s",
        ),
    ],
)
def test_bad_jsonl(tmp_path, text, expected):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    assert expected in failure(path)


def test_a_line_without_end_does_not_fill_the_memory(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(GOOD + "[" + "1," * (9 << 20))
    assert "line 2: longer than 16 MiB" in failure(path)


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\x7fELF\x02\x01\x01\0\0\0", "binary or compressed file; expected plain UTF-8 text"),
        (b"\x1f\x8b\x08 compressed", "binary or compressed file"),
        (HEADER.encode("utf-16"), "binary or compressed file"),
        (b"PAR1 and more", "is a Parquet file; expected text, or the extension .parquet"),
        (bytes(range(128, 256)) * 50, "expected"),
    ],
)
def test_binary_files_with_a_text_extension(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content)
    assert expected in failure(path)


def test_binary_rows_after_a_good_header(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(HEADER.encode() + b"0,1,1\n" + bytes(range(128, 256)) + b",1,1\n")
    assert "row 2, column 'arrival_s': expected a number" in failure(path)


def test_a_csv_row_longer_than_any_block(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(HASHED + "0,1,1," + "1 " * (5 << 20) + ",16\n")
    assert "expected comma-separated text" in failure(path)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: p / "absent.csv", "cannot be read: No such file or directory; expected a CSV"),
        (lambda p: p / "absent", "cannot be read: No such file or directory"),
        (lambda p: p, "is a directory; expected a CSV (.csv), JSON Lines (.jsonl), Parquet (.parquet)"),
        (lambda p: p / ("a" * 300 + ".csv"), "cannot be read: File name too long"),
        (lambda p: _touched(p / "x.xlsx"), "unknown extension '.xlsx'; expected a CSV"),
        (lambda p: _touched(p / "x.csv.gz"), "unknown extension '.gz'"),
        (lambda p: _touched(p / "x"), "unknown extension ''"),
        (lambda p: _touched(p / "x.parquet"), "it does not start with the bytes PAR1"),
        (lambda p: Path("/dev/null"), "is not a regular file"),
    ],
)
def test_not_a_trace_file(tmp_path, make: Callable[[Path], Path], expected):
    assert expected in failure(make(tmp_path))


def _touched(path: Path) -> Path:
    path.touch()
    return path


def test_a_file_name_cannot_break_the_line(tmp_path):
    path = tmp_path / "two\nlines.csv"
    with pytest.raises(InputError, match=r"two\\nlines.csv: cannot be read") as caught:
        read_trace(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="not a file name"):
        read_trace(Path("a\0b.csv"))


INTS = pa.array([1, 2])


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"arrival_s": INTS, "prompt_tokens": INTS}, "missing column 'output_tokens'"),
        ({"arrival_s": INTS, "prompt_tokens": INTS, "output_token": INTS}, "did you mean 'output_tokens'?"),
        ({"output_tokens": pa.array(["a", "b"])}, "column 'output_tokens': expected numbers, found type string"),
        ({"output_tokens": pa.nulls(2)}, "column 'output_tokens': expected numbers, found type null"),
        ({"arrival_s": pa.array([True, False])}, "column 'arrival_s': expected numbers, found type bool"),
        ({"output_tokens": pa.array([1, None])}, f"row 2, column 'output_tokens': {WHOLE}NaN or an empty value"),
        ({"arrival_s": pa.array([5, 4])}, "row 2, column 'arrival_s': arrivals must not decrease, but 4 s follows 5 s"),
        ({"output_tokens": pa.array([1, 2**62])}, f"row 2, column 'output_tokens': {WHOLE}4.6"),
        ({"hash_block_ids": pa.array([[1], [2]])}, "missing column 'hash_block_tokens'"),
        ({"hash_block_ids": INTS, "hash_block_tokens": INTS}, "expected a list of integers, found type int64"),
        (
            {"hash_block_ids": pa.array([[1], [2, None]]), "hash_block_tokens": INTS},
            "row 2, column 'hash_block_ids': an id is empty",
        ),
        (
            {"hash_block_ids": pa.array([None, []], pa.list_(pa.int32())), "hash_block_tokens": INTS},
            "row 2, column 'hash_block_ids': expected 1 block ids for 2 prompt tokens in blocks of 2, got 0",
        ),
    ],
)
def test_bad_parquet(tmp_path, columns, expected):
    path = tmp_path / "x.parquet"
    names = HEADER.strip().split(",")
    whole = columns if "missing column 'output" in expected or "did you" in expected else dict.fromkeys(names, INTS)
    pq.write_table(pa.table({**whole, **columns}), path)
    assert expected in failure(path)


def test_empty_parquet(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table(dict.fromkeys(HEADER.strip().split(","), INTS)).slice(0, 0), path)
    assert "empty trace; expected at least one request" in failure(path)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.9999])
def test_truncated_parquet(tmp_path, share):
    content = (TRACES / "azure2023-code.parquet").read_bytes()
    path = tmp_path / "x.parquet"
    path.write_bytes(content[: int(len(content) * share)])
    assert "expected a Parquet file, but it is truncated or corrupt" in failure(path)


def test_corrupt_parquet_never_escapes_as_another_error(tmp_path):
    table = pq.read_table(TRACES / "mooncake-synthetic.parquet").slice(0, 200)
    path = tmp_path / "x.parquet"
    pq.write_table(table, path)
    content = path.read_bytes()
    rng = random.Random(0)
    messages = []
    for _ in range(300):
        broken = bytearray(content)
        for _ in range(rng.randint(1, 8)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        path.write_bytes(broken)
        try:
            list(read_trace(path))
        except InputError as error:
            messages.append(str(error))
    assert len(messages) > 100
    assert not any("\n" in message for message in messages)


def test_a_bad_first_chunk_is_reported_before_the_stream_is_used(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(HEADER + "0,1,0\n")
    with pytest.raises(InputError, match="row 1, column 'output_tokens'"):
        traffic.stream(TraceWorkload(trace=str(path)), seed=0)


def test_what_trace_path_raises_is_passed_on():
    def unknown(name: str) -> Path:
        raise InputError(f"trace '{name}' is unknown")

    with pytest.raises(InputError, match="trace 'nothing' is unknown"):
        traffic.stream(TraceWorkload(trace="nothing"), seed=0, trace_path=unknown)
