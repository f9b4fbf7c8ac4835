"""JSON that is read back: what is within the bounds is read as it is, and everything else is named in a line."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from distkit.errors import nearest, printable
from distkit.json_files import (
    MAX_DEPTH,
    JsonError,
    Kind,
    a_count,
    a_flag,
    a_number,
    a_text,
    an_amount,
    an_object,
    anything,
    known,
    list_of,
    mapping_of,
    optional,
    parse,
    parse_lines,
    parse_object,
    read_object,
    record,
)


def refusal(data: bytes) -> str:
    with pytest.raises(JsonError) as caught:
        parse(data)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 200
    return message


def test_what_python_writes_is_read_back() -> None:
    value = {"a": [1, -2.5, 1e300, "é\ud800", None, True, {}], "b": {"c": [[]]}, "seed": 2**64, "": ""}
    assert parse(json.dumps(value).encode()) == value
    assert parse(b"\xef\xbb\xbf[1]") == [1]  # an editor's mark
    assert parse(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    infinite = parse(b'{"best": -Infinity, "loss": NaN}', finite=False)
    assert isinstance(infinite, dict)
    assert infinite["best"] == -math.inf


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"{}x", "is not JSON"),
        (b"NaN", "is not JSON: NaN"),
        (b"[-Infinity]", "is not JSON: -Infinity"),
        (b"[1e999]", "a number that is too large"),
        (b"9" * 5001, "a number of 5,001 digits"),
        (b"0." + b"1" * 5001, "a number of 5,003 digits"),
        (b"\xff\xfe{\x00}\x00", "is not UTF-8: byte 0"),
        ('{"caf\xe9": 1}'.encode("latin-1"), "is not UTF-8"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "nested more than 64 deep"),
        (b"[" * 10**6, "nested more than 64 deep"),
        (b'{"a":' * 10**5, "nested more than 64 deep"),
        (b'{"a": 1, "b": {"\\u001b[31m": 1, "\\u001b[31m": 2}}', r"names '\x1b[31m' twice"),
        (b'{"' + b"x" * 5000 + b'": 1}', "a name of more than 4096 characters"),
    ],
)
def test_what_is_refused(data: bytes, reason: str) -> None:
    assert reason in refusal(data)


@pytest.mark.timeout(20)  # a comparison of each with each takes hours
def test_a_name_that_comes_twice_among_many_is_found_at_once() -> None:
    pairs = ",".join(f'"{number}":0' for number in (*range(200_000), 199_999))
    assert refusal(f"{{{pairs}}}".encode()) == "names '199999' twice"


def test_objects_and_lines(tmp_path: Path) -> None:
    with pytest.raises(JsonError, match="is not a JSON object, but a list"):
        parse_object(b"[]")
    assert list(parse_lines(b'{"a": 1}\n[]\n{"b"\n\xff\n\n{"c": 2}')) == [{"a": 1}, {"c": 2}]
    file = tmp_path / "a.json"
    file.write_text('{"a": 1}')
    (tmp_path / "link").symlink_to(file)
    assert read_object(file) == read_object(tmp_path / "link") == {"a": 1}
    with pytest.raises(OSError, match="more than the 4 bytes"):
        read_object(file, most=4)
    os.truncate(file, 2**40)
    with pytest.raises(OSError, match="more than the"):
        read_object(file)


@pytest.mark.timeout(20)
def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        with pytest.raises(OSError, match="is not a regular file"):
            read_object(path)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (a_text, ["", "x"], [None, 1, []]),
        (a_flag, [True, False], [None, 1, 0, "true"]),
        (a_count, [0, 2**63 - 1], [None, -1, 2**63, True, 1.0, "1", []]),
        (a_number, [0, -1, 1.5, 10**299], [None, True, "1", math.nan, math.inf]),
        (an_amount, [0, 1.5], [-1, -0.5, True, math.nan]),
        (an_object, [{}, {"a": 1}], [None, [], "x"]),
        (anything, [None, [{}], math.nan], []),
        (optional(a_text), [None, "x"], [1]),
        (list_of(a_count), [[], [1, 2]], [None, {}, "12", [1, "2"], [[1]]]),
        (mapping_of(a_count), [{}, {"a": 1}], [None, [], {"a": None}]),
        (record({"a": a_count}, {"b": a_text}), [{"a": 1}, {"a": 1, "b": "x", "c": []}], [{}, [], {"a": 1, "b": 1}]),
    ],
)
def test_kinds(kind: Kind, good: list[object], bad: list[object]) -> None:
    for value in good:
        kind(value)
    for value in bad:
        with pytest.raises(JsonError):
            kind(value)


def test_a_refusal_says_where() -> None:
    kind = record({"parts": mapping_of(list_of(record({"step": a_count})))})
    with pytest.raises(JsonError) as caught:
        kind({"parts": {"clock": [{"step": 1}, {"step": "\x1b" * 1000}]}})
    message = caught.value.of("state.json")
    assert message.startswith(r'state.json: parts.clock.1.step: "\u001b')
    assert len(message) < 150
    with pytest.raises(JsonError) as caught:
        kind({})
    assert caught.value.of("state.json") == "state.json has no parts"


def test_what_is_known_is_kept() -> None:
    assert known({"a": 1, "b": "x", "c": 2}, {"a": a_count, "b": a_count, "d": a_text}) == {"a": 1}


def test_text_for_a_terminal() -> None:
    assert printable("é 中\u00a0\u3000\U0001f600") == "é 中\u00a0\u3000\U0001f600"
    assert printable("\x1b[31m\x07\x9b\u202e\u2066\ud800\udcff\n") == r"\x1b[31m\x07\x9b\u202e\u2066\ud800\udcff\n"
    assert printable("a\tb\n\r", keep="\n\t") == "a\tb\n\\r"


@pytest.mark.timeout(20)
def test_no_word_is_like_one_that_nobody_types() -> None:
    assert nearest("optin.lr", ["optim.lr", "seed"]) == "optim.lr"
    assert nearest("optim.l" * 10**5, ["optim.lr" * 10**5]) is None
