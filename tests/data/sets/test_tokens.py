"""Token files: windows against plain slices, nothing loaded, every fault named."""

from __future__ import annotations

import pickle
import time

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distkit.data import Dataset, as_dataset
from distkit.data.sets import fingerprint as fingerprint_module
from distkit.data.sets import tokens as token_module
from distkit.data.sets.tokens import TokenDataset, TokenFile
from distkit.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokens")


def write(path, tokens, dtype="uint16"):
    np.asarray(tokens).astype(np.dtype(dtype).newbyteorder("<")).tofile(path)
    return path


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_windows_are_plain_slices(folder, data):
    dtype = data.draw(st.sampled_from(["uint16", "uint32"]))
    most = np.iinfo(dtype).max
    tokens = data.draw(st.lists(st.integers(0, most), min_size=2, max_size=80))
    length = data.draw(st.integers(1, len(tokens) - 1))
    dataset = TokenDataset(write(folder / "t.bin", tokens, dtype), length, dtype=dtype, vocab_size=most + 1)
    assert len(dataset) == (len(tokens) - 1) // length
    indices = data.draw(st.lists(st.integers(0, len(dataset) - 1), max_size=9))
    inputs, targets = dataset.fetch(torch.tensor(indices, dtype=torch.int64))
    assert inputs.shape == targets.shape == (len(indices), length)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous()
    assert targets.is_contiguous()
    for row, i in enumerate(indices):
        assert inputs[row].tolist() == tokens[i * length : (i + 1) * length]
        assert targets[row].tolist() == tokens[i * length + 1 : (i + 1) * length + 1]


@settings(max_examples=30, deadline=None)
@given(count=st.integers(20, 500), length=st.integers(1, 4), cut=st.floats(0.3, 0.7))
def test_two_shares_have_no_target_in_common(folder, count, length, cut):
    path = write(folder / "s.bin", np.arange(count))
    train, test = (TokenDataset(path, length, share=share) for share in ((0, cut), (cut, 1)))
    seen = [dataset.fetch(torch.arange(len(dataset))) for dataset in (train, test)]
    assert seen[0][1].max() < int(count * cut) <= seen[1][0].min()
    assert seen[0][0].flatten().tolist() == list(range(len(train) * length))
    assert seen[1][0].flatten().tolist() == list(range(int(count * cut), int(count * cut) + len(test) * length))
    assert count - length <= seen[1][1].max() < count


def test_it_is_a_data_set(folder):
    dataset = TokenDataset(write(folder / "t.bin", range(100)), 9)
    assert as_dataset(dataset) is dataset
    assert isinstance(dataset, Dataset)
    assert TokenFile(folder / "t.bin").tokens[5:8].tolist() == [5, 6, 7]
    assert len(TokenFile(str(folder / "t.bin"), "uint32")) == 50


def test_a_file_larger_than_memory_costs_nothing(tmp_path):
    """64 GB of zeros that take no room on the disk, with tokens at both ends."""
    path = tmp_path / "huge.bin"
    with path.open("wb") as file:
        file.truncate(2**36)
        file.write(np.arange(1, 10, dtype="<u2").tobytes())
        file.seek(2**36 - 20)
        file.write(np.arange(1, 11, dtype="<u2").tobytes())
    process = psutil.Process()
    before, start = process.memory_info().rss, time.perf_counter()
    dataset = TokenDataset(path, 1023)
    assert len(dataset) == (2**35 - 1) // 1023
    inputs, targets = dataset.fetch(torch.tensor([0, len(dataset) - 1, 12345]))
    assert inputs[0, :10].tolist() == [*range(1, 10), 0]
    first = (len(dataset) - 1) * 1023
    tail = np.fromfile(path, "<u2", 1023, offset=2 * (first + 1))
    assert targets[1].tolist() == tail.tolist()
    assert not inputs[2].any()
    assert process.memory_info().rss - before < 20e6
    assert time.perf_counter() - start < 1


def test_the_fingerprint_tells_files_apart(tmp_path, monkeypatch):
    def fingerprint(tokens, dtype="uint16"):
        np.asarray(tokens, dtype).tofile(tmp_path / "f.bin")
        return TokenDataset(tmp_path / "f.bin", 4, dtype=dtype).fingerprint

    tokens = np.arange(1000) % 97
    one = fingerprint(tokens)
    assert one == fingerprint(tokens)
    assert len(one) == 16
    assert len({one, fingerprint(tokens[:-1]), fingerprint(tokens + 1), fingerprint(tokens, "uint32")}) == 4
    for place in (0, 500, 999):
        changed = tokens.copy()
        changed[place] += 1
        assert fingerprint(changed) != one
    fingerprint(tokens)
    (tmp_path / "f.bin.json").write_text("{}")
    assert TokenDataset(tmp_path / "f.bin", 4).fingerprint != one
    # of a file that is larger than what is read, the first and the last block count
    monkeypatch.setattr(token_module, "FINGERPRINT_BLOCKS", 2)
    monkeypatch.setattr(fingerprint_module, "BLOCK_BYTES", 64)
    large = fingerprint(tokens)
    assert large != fingerprint([*tokens[:-1], 5])
    assert large == fingerprint([*tokens[:500], 96, *tokens[501:]])


def test_a_pickled_copy_maps_the_file_again(folder):
    dataset = TokenDataset(write(folder / "t.bin", np.arange(50_000)), 100)
    expected = dataset.fetch(torch.tensor([3, 400]))
    sent = pickle.dumps(dataset)
    assert len(sent) < 1000
    for one, other in zip(pickle.loads(sent).fetch(torch.tensor([3, 400])), expected, strict=True):
        assert one.equal(other)


def test_batches_do_not_share_memory_with_the_file(folder):
    path = write(folder / "t.bin", np.arange(100))
    before = path.read_bytes()
    inputs, targets = TokenDataset(path, 10).fetch(torch.tensor([0, 1]))
    inputs.zero_()
    targets.zero_()
    assert path.read_bytes() == before


def test_faults_are_named(tmp_path):
    path = tmp_path / "t.bin"
    with pytest.raises(DataError, match=r"t\.bin cannot be read"):
        TokenFile(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="got: +0 bytes"):  # noqa: RUF043
        TokenFile(path)
    path.write_bytes(b"123456")
    assert len(TokenFile(path)) == 3
    with pytest.raises(DataError, match=r"multiple of 4 bytes\n.*6 bytes"):
        TokenDataset(path, 1, dtype="uint32")
    with pytest.raises(DataError, match=r"at least 4 tokens.*\n.*3 tokens\n.*sequence_length=2"):
        TokenDataset(path, 3)
    with pytest.raises(DataError, match=r"2 tokens\n.*--context-length 1"):
        TokenDataset(path, 3, share=(0.0, 0.7), option="context_length")
    assert len(TokenDataset(path, 2)) == 1


def test_impossible_arguments_are_refused(folder):
    path = write(folder / "t.bin", range(100))
    for bad in [{"sequence_length": 0}, {"dtype": "int8"}, {"vocab_size": 0}, {"share": (0.5, 0.5)}, {"share": (0, 2)}]:
        with pytest.raises(ConfigError):
            TokenDataset(path, **{"sequence_length": 4, **bad})
    with pytest.raises(DataError, match="5 tokens"):
        TokenDataset(path, 5, share=(0.95, 1))


def test_a_token_outside_the_vocabulary_is_named_with_its_place(folder):
    path = write(folder / "t.bin", [*range(50), 900, *range(50)])
    dataset = TokenDataset(path, 7, vocab_size=50)
    dataset.fetch(torch.tensor([0, 5]))
    with pytest.raises(DataError, match=r"below 50.*\n.*900 at token 50"):
        dataset.fetch(torch.tensor([1, 7]))
    with pytest.raises(DataError, match="at token 50"):
        TokenDataset(path, 7, vocab_size=50, share=(0.3, 1)).fetch(torch.arange(9))
    assert TokenDataset(path, 7).fetch(torch.tensor([7]))[0][0, 1] == 900
