"""Text as token files, with the vocabulary beside them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distkit.data.sets import text
from distkit.data.sets.text import Vocabulary, encode_text_file, encoded_text, read_vocabulary
from distkit.data.sets.tokens import TokenDataset, TokenFile
from distkit.errors import ConfigError, DataError

SHAKESPEARE = Path(__file__).parents[4] / "shared" / "data" / "tinyshakespeare.txt"
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("text")


@settings(max_examples=60, deadline=None)
@given(content=TEXT, level=st.sampled_from(["byte", "char"]), chunk=st.integers(1, 20))
def test_what_is_encoded_can_be_read(folder, content, level, chunk):
    (folder / "a.txt").write_bytes(content.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "CHUNK", chunk)
        vocabulary = encode_text_file(folder / "a.txt", folder / "a.bin", level=level)
    assert read_vocabulary(folder / "a.bin") == vocabulary
    tokens = TokenFile(folder / "a.bin", vocabulary.dtype).tokens
    assert len(tokens) == len(content.encode() if level == "byte" else content)
    assert int(tokens.max()) < vocabulary.size
    assert vocabulary.decode(tokens) == content
    assert vocabulary.encode(content).tolist() == tokens.tolist()
    if level == "char":
        assert vocabulary.characters == "".join(sorted(set(content)))


def test_only_two_files_are_left(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    encode_text_file(tmp_path / "a.txt", tmp_path / "a.bin")
    encode_text_file(str(tmp_path / "a.txt"), str(tmp_path / "a.bin"), level="byte")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.bin.json", "a.txt"]
    stored = json.loads((tmp_path / "a.bin.json").read_text())
    assert stored["num_tokens"] == 5
    assert stored["vocab_size"] == 256
    assert stored["sha256"] == hashlib.sha256((tmp_path / "a.bin").read_bytes()).hexdigest()


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    path = tmp_path / "a.txt"
    with pytest.raises(DataError, match=r"a\.txt cannot be encoded"):
        encode_text_file(path, out / "a.bin")
    path.write_bytes(b"")
    with pytest.raises(DataError, match="is empty"):
        encode_text_file(path, out / "a.bin")
    path.write_bytes("für".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8 text"):
        encode_text_file(path, out / "a.bin")
    path.write_bytes("für".encode()[:2])
    with pytest.raises(DataError, match="not UTF-8 text"):
        encode_text_file(path, out / "a.bin")
    assert encode_text_file(path, tmp_path / "b.bin", level="byte").size == 256
    with pytest.raises(DataError, match="cannot be encoded"):
        encode_text_file(path, tmp_path / "nowhere" / "b.bin", level="byte")
    with pytest.raises(ConfigError, match="byte or char"):
        encode_text_file(path, out / "a.bin", level="word")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(text.os, "fsync", full)
    with pytest.raises(DataError, match="No space left"):
        encode_text_file(path, out / "a.bin", level="byte")
    assert list(out.iterdir()) == []


def test_a_vocabulary_belongs_to_its_tokens(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    encode_text_file(tmp_path / "a.txt", tmp_path / "a.bin")
    (tmp_path / "a.bin").write_bytes(b"1234")
    with pytest.raises(DataError, match=r"5 tokens\n.*2 tokens"):
        read_vocabulary(tmp_path / "a.bin")
    for damage in ("", "[]", "{}"):
        (tmp_path / "a.bin.json").write_text(damage)
        with pytest.raises(DataError, match=r"a\.bin\.json cannot be read"):
            read_vocabulary(tmp_path / "a.bin")
    (tmp_path / "a.bin.json").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        read_vocabulary(tmp_path / "a.bin")


def test_unknown_characters_are_named():
    with pytest.raises(DataError, match="got: +'z'"):  # noqa: RUF043
        Vocabulary("char", "abc").encode("abz")
    with pytest.raises(DataError, match="'a'"):
        Vocabulary("char", "").encode("a")


def test_a_large_vocabulary_takes_four_bytes():
    characters = "".join(chr(i) for i in range(0x10000, 0x20001))
    assert Vocabulary("char", characters).dtype == "uint32"
    assert Vocabulary("char", characters[:-1]).dtype == "uint16"


def test_bytes_that_are_no_text_are_replaced():
    assert Vocabulary("byte").decode(np.array([104, 255, 105])) == "h�i"


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason=f"{SHAKESPEARE} is not here")
def test_shakespeare(tmp_path):
    vocabulary = encode_text_file(SHAKESPEARE, tmp_path / "s.bin")
    content = SHAKESPEARE.read_text()
    assert vocabulary.size == 65
    train, test = (TokenDataset(tmp_path / "s.bin", 256, vocab_size=65, share=share) for share in ((0, 0.9), (0.9, 1)))
    assert len(train) == (int(len(content) * 0.9) - 1) // 256
    inputs, targets = train.fetch(torch.tensor([0, len(train) - 1]))
    assert vocabulary.decode(inputs[0].numpy()) == content[:256]
    assert vocabulary.decode(targets[1].numpy()) == content[(len(train) - 1) * 256 + 1 :][:256]
    assert vocabulary.decode(test.fetch(torch.tensor([0]))[0][0].numpy()) == content[int(len(content) * 0.9) :][:256]


@pytest.mark.parametrize("name", [b"caf\xe9.txt", "n\u00e9" * 80 + ".txt", "x" * 240 + ".txt"])
def test_any_name_of_a_text(tmp_path, name):
    """Latin-1, and as long as a file system takes it."""
    path = tmp_path / os.fsdecode(name)
    path.write_text("abcabc")
    made = {level: encoded_text(path, tmp_path / "tokens", level) for level in ("char", "byte")}
    for level, out in made.items():
        vocabulary = read_vocabulary(out)
        assert vocabulary.decode(np.fromfile(out, "<u2")) == "abcabc"
        assert encoded_text(path, tmp_path / "tokens", level) == out
    assert len(set(made.values())) == 2
