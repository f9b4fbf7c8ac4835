"""Token files: raw little-endian uint16 or uint32 numbers, memory mapped, read by windows, of any size."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distkit.config.check import flag, require, require_number
from distkit.data.sets.fingerprint import DIGITS, spread
from distkit.errors import DataError

TokenDtype = Literal["uint16", "uint32"]
Tokens = NDArray[np.uint16] | NDArray[np.uint32]
#: What a fingerprint reads of a file: at most this many blocks of 64 KiB.
FINGERPRINT_BLOCKS = 256


class TokenFile:
    """A file of tokens and nothing else. It is mapped, never loaded; a copy sent to another process maps it again.

    Args:
        path: the file.
        dtype: uint16 or uint32, little-endian.

    Raises:
        ConfigError: another dtype.
        DataError: the file is missing or empty, or its size is not a multiple of a token's.
    """

    def __init__(self, path: Path | str, dtype: TokenDtype = "uint16") -> None:
        require(dtype in get_args(TokenDtype), "dtype", "uint16 or uint32", dtype, "uint16")
        self.path = Path(path)
        self.dtype: TokenDtype = dtype
        self._length = self._count()
        self._tokens: Tokens | None = None

    def __len__(self) -> int:
        """Number of tokens."""
        return self._length

    @property
    def tokens(self) -> Tokens:
        """The tokens, read-only [len(self)]; a page is read from disk when it is touched."""
        if self._tokens is None:
            kind = np.dtype(self.dtype).newbyteorder("<")
            # A plain view: every slice of a np.memmap costs microseconds for bookkeeping that nothing needs.
            self._tokens = np.asarray(np.memmap(self.path, kind, "r", shape=(self._length,)))
        return self._tokens

    def __getstate__(self) -> Mapping[str, object]:
        return {**self.__dict__, "_tokens": None}

    def _count(self) -> int:
        try:
            size = self.path.stat().st_size
        except OSError as error:
            raise DataError(
                f"the token file {self.path} cannot be read",
                expected="a file of raw tokens, such as distkit.data.sets.text.encode_text_file writes",
                got=error,
            ) from error
        count, rest = divmod(size, np.dtype(self.dtype).itemsize)
        if rest or not count:
            raise DataError(
                f"the token file {self.path} does not hold whole {self.dtype} tokens",
                expected=f"a positive multiple of {np.dtype(self.dtype).itemsize} bytes",
                got=f"{size} bytes",
            )
        return count


class TokenDataset:
    """Windows of a token file that do not overlap, each with the tokens that come next.

    Window i of tokens t: inputs t[i * L : (i + 1) * L], targets t[i * L + 1 : (i + 1) * L + 1]. A rest shorter than a
    window is left out.

    Args:
        path: the token file.
        sequence_length: L, tokens in a window, >= 1.
        dtype: uint16 or uint32.
        vocab_size: every token that is fetched must be below; None: not checked.
        share: from where to where the file is read, as fractions of its tokens: (0, 0.9) to train, (0.9, 1) to test.
        option: what the recipe calls sequence_length, for messages: `context_length`.

    Raises:
        ConfigError: an argument is out of range.
        DataError: the file is missing, holds no whole tokens or not one window.
    """

    #: Read ahead of the step: a page of the file may have to come from the disk.
    memory_mapped = True

    def __init__(
        self,
        path: Path | str,
        sequence_length: int,
        *,
        dtype: TokenDtype = "uint16",
        vocab_size: int | None = None,
        share: tuple[float, float] = (0.0, 1.0),
        option: str | None = None,
    ) -> None:
        require_number("sequence_length", sequence_length, least=1, example="256")
        require_number("vocab_size", vocab_size, least=1, example="50304")
        require(0 <= share[0] < share[1] <= 1, "share", "two fractions, 0 <= first < last <= 1", share, "(0.0, 0.9)")
        self.file = TokenFile(path, dtype)
        self.sequence_length = sequence_length
        self.vocab_size = vocab_size
        self.first, self.last = (int(len(self.file) * place) for place in share)
        self._num_windows = (self.last - self.first - 1) // sequence_length
        if self._num_windows < 1:
            own, rest = self.last - self.first, len(self.file) - (self.last - self.first)
            fitting = max(min(own, rest or own) - 1, 1)  # the other split has to have a window, too
            raise DataError(
                f"the token file {path} is shorter than one window",
                expected=f"at least {sequence_length + 1} tokens: the window's and the one that comes next",
                got=f"{own} tokens",
                fix=f"sequence_length={fitting}" if option is None else f"{flag(option)} {fitting}",
            )
        self._windows: Tokens | None = None

    def __len__(self) -> int:
        """Number of windows."""
        return self._num_windows

    def __getstate__(self) -> Mapping[str, object]:
        return {**self.__dict__, "_windows": None}

    @property
    def fingerprint(self) -> str:
        """Tells this file, with its vocabulary, from another: 16 hexadecimal digits.

        A sha256 of the number of tokens, of evenly spread blocks of them (of everything up to 16 MiB), and of the
        vocabulary next to the file.
        """
        tokens = self.file.tokens
        digest = hashlib.sha256(f"{self.file.dtype} {len(tokens)}\n".encode())
        for block in spread(tokens.view(np.uint8), FINGERPRINT_BLOCKS):
            digest.update(block)
        sidecar = vocabulary_file(self.file.path)
        if sidecar.is_file():
            digest.update(sidecar.read_bytes())
        return digest.hexdigest()[:DIGITS]

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [B] on the CPU -> inputs int64 [B, L] and targets int64 [B, L], contiguous.

        Raises:
            DataError: a token is not below `vocab_size`; the message says where it is in the file.
        """
        if self._windows is None:
            self._windows = self._overlapping_by_one()
        numbers = indices.numpy()
        windows = self._windows[numbers]
        if self.vocab_size is not None and windows.size and int(windows.max()) >= self.vocab_size:
            self._refuse(numbers, windows, self.vocab_size)
        return (
            torch.from_numpy(windows[:, :-1].astype(np.int64, order="C")),
            torch.from_numpy(windows[:, 1:].astype(np.int64, order="C")),
        )

    def _overlapping_by_one(self) -> Tokens:
        """[len(self), L + 1], a view of the file: row i starts at window i, and its last token is row i + 1's first."""
        tokens = self.file.tokens[self.first : self.last]
        shape = (self._num_windows, self.sequence_length + 1)
        strides = (self.sequence_length * tokens.itemsize, tokens.itemsize)
        return cast(Tokens, np.lib.stride_tricks.as_strided(tokens, shape, strides, writeable=False))

    def _refuse(self, numbers: NDArray[np.int64], windows: Tokens, vocab_size: int) -> None:
        row, column = (int(place[0]) for place in np.nonzero(windows >= vocab_size))
        offset = self.first + int(numbers[row]) * self.sequence_length + column
        raise DataError(
            f"the token file {self.file.path} has a token outside the vocabulary",
            expected=f"tokens below {vocab_size}, stored as {self.file.dtype}",
            got=f"{int(windows[row, column])} at token {offset}",
        )


def vocabulary_file(token_file: Path) -> Path:
    """Path of the vocabulary of an encoded text."""
    return token_file.with_name(token_file.name + ".json")
