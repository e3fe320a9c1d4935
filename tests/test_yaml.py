"""The YAML reader: plain data in, one-line refusals for everything else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfsim.errors import InputError
from perfsim.spec.yaml import load_yaml, parse_yaml_value

BOMB = """a: &a [x, x, x, x, x, x, x, x, x]
b: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]
c: [*b, *b, *b, *b, *b, *b, *b, *b, *b]
"""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 8), ("-5", -5), ("0.5", 0.5), ("1e-3", 1e-3), ("true", True), ("False", False), ("null", None),
        ("", None), ("500ms", "500ms"), ("80 GiB", "80 GiB"), ("'8'", "8"), ("[1, a]", [1, "a"]),
        ("{p95: 500ms}", {"p95": "500ms"}),
        ("off", "off"), ("12:30:00", "12:30:00"), ("2024-01-01", "2024-01-01"), ("010", 10), ("{1: 2}", {"1": 2}),
    ],
)  # fmt: skip
def test_values_follow_the_core_schema(text: str, value: object) -> None:
    parsed = parse_yaml_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        (BOMB, 1, "anchors and aliases are not allowed"),
        ("a: 1\nb: !!python/object/apply:os.system ['true']", 2, "tag"),
        ("a: !custom 1", 1, "tag"),
        ("a: 1\nb: 2\na: 3", 3, "duplicate key 'a'"),
        ("x:\n  <<: {a: 1}", 2, "merge keys"),
        ("a: .nan", 1, "finite"),
        ("a: -.inf", 1, "finite"),
        ("a: 1e999", 1, "too large"),
        ("a: 1\n---\nb: 2", 2, "one document"),
        ("a: [1, 2", 1, "not valid YAML"),
        ("a: " + "9" * 5000, 1, "5000 characters"),
        ("a: " + "[" * 50_000, 1, "nest"),  # PyYAML 6.0.4 has a limit of its own and words it its own way
        ("? [a]\n: 1", 1, "plain name as key"),
    ],
)
def test_refusals_name_file_and_line(tmp_path: Path, text: str, line: int, reason: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_yaml(path)
    message = str(caught.value)
    assert reason in message
    assert message.startswith(f"{path}: line {line}:") or "not valid YAML" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x7fELF\x00\x01\x02\xff", "not UTF-8"),
        (b"a: \x00", "binary"),
        (b"a: \xff\xfe", "not UTF-8"),
        (b"- 1\n- 2", "expected a mapping"),
        (b"just text", "expected a mapping"),
        (b"", "expected a mapping"),
        (b"a: 1\n" + b"#" * (1 << 20), "larger than"),
    ],
)
def test_unusable_files(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=reason) as caught:
        load_yaml(path)
    assert str(path) in str(caught.value)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_yaml(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        load_yaml(tmp_path)


def test_a_plain_file(tmp_path: Path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text("# comment\nname: x\nnested:\n  list: [1, 2.5, 3 GB]\n  none: ~\n")
    assert load_yaml(path) == {"name": "x", "nested": {"list": [1, 2.5, "3 GB"], "none": None}}


@given(st.text(max_size=60))
def test_any_text_is_a_value_or_an_input_error(text: str) -> None:
    try:
        parse_yaml_value(text)
    except InputError as error:
        if len(str(error).splitlines()) != 1:
            pytest.fail(str(error))
