"""Text as token files: bytes or characters, with a JSON file next to them that says what each number means."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from distkit.config.check import require
from distkit.data.sets.tokens import TokenDtype, TokenFile, vocabulary_file
from distkit.errors import DataError
from distkit.files import atomic_file, write_bytes
from distkit.json_files import a_count, a_text, read_object, record

Level = Literal["byte", "char"]
#: Bytes of text encoded at a time.
CHUNK = 1 << 22
#: Of a text's name that are kept in the name of its tokens.
MAX_STEM_BYTES = 200


@dataclass(frozen=True)
class Vocabulary:
    """What the numbers of an encoded text mean.

    Args:
        level: byte: token i is the byte i of UTF-8. char: token i is the character `characters[i]`.
        characters: in the order of their code points; empty for bytes.
    """

    level: Level
    characters: str = ""

    @property
    def size(self) -> int:
        """Number of tokens."""
        return 256 if self.level == "byte" else len(self.characters)

    @property
    def dtype(self) -> TokenDtype:
        """The smallest dtype that holds every token."""
        return "uint16" if self.size <= 2**16 else "uint32"

    def encode(self, text: str) -> NDArray[np.int64]:
        """Text -> tokens, int64 [N].

        Raises:
            DataError: a character has no token.
        """
        if self.level == "byte":
            return np.frombuffer(text.encode(), np.uint8).astype(np.int64)
        known, points = _points(self.characters), _points(text)
        tokens = np.searchsorted(known, points)
        wrong = known[np.minimum(tokens, len(known) - 1)] != points if len(known) else np.ones(len(points), bool)
        if wrong.any():
            raise DataError(
                "a character is not in the vocabulary",
                expected=f"one of its {self.size} characters",
                got=repr(text[int(wrong.argmax())]),
            )
        return tokens

    def decode(self, tokens: NDArray[np.integer]) -> str:
        """Tokens [N] -> text; bytes that are not UTF-8 become U+FFFD."""
        if self.level == "byte":
            return np.asarray(tokens).astype(np.uint8).tobytes().decode(errors="replace")
        return "".join(self.characters[i] for i in np.asarray(tokens).tolist())


def _points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def encode_text_file(path: Path | str, out: Path | str, *, level: Level = "char") -> Vocabulary:
    """Write the text file `path` as the token file `out`, and its vocabulary as `out` + ".json".

    The text is read in pieces, so it may be of any size. Both files are complete when they get their names.

    Args:
        path: text in UTF-8; for level byte any file.
        out: the token file, replaced where it is there.
        level: byte, or char: one token for every different character of this file.

    Raises:
        DataError: the text cannot be read, is empty or no UTF-8, or `out` cannot be written.
    """
    require(level in get_args(Level), "level", "byte or char", level, "char")
    path, out = Path(path), Path(out)
    try:
        vocabulary = Vocabulary(level, "" if level == "byte" else _characters(path))
        _write_both(path, out, vocabulary)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text", expected="UTF-8, or level='byte'", got=error) from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be encoded into {out}", expected="a text file, and free space", got=error
        ) from error
    return vocabulary


def encoded_text(path: Path, folder: Path, level: Level) -> Path:
    """The token file of the text `path` in `folder`, encoded unless that was done before.

    Its name changes with the text's path, size and time of change, and with the level.

    Raises:
        DataError: the text cannot be read, or `folder` cannot be written.
    """
    try:
        status = path.stat()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"the text {path} cannot be read, or not be encoded into {folder}",
                        expected="a text file, and a folder that can be written", got=error,
                        fix="--text FILE --data.root DIR") from error  # fmt: skip
    text = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    key = hashlib.sha256(os.fsencode(text)).hexdigest()[:12]
    # a file system takes names of 255 bytes, and this one gets a longer ending
    stem = os.fsdecode(os.fsencode(path.stem)[:MAX_STEM_BYTES])
    out = folder / f"{stem}-{level}-{key}.bin"
    if not out.exists():
        encode_text_file(path, out, level=level)
    return out


def read_vocabulary(token_file: Path | str) -> Vocabulary:
    """The vocabulary that `encode_text_file` wrote next to a token file.

    Raises:
        DataError: there is none, it is damaged, or it belongs to a token file of another length.
    """
    sidecar = vocabulary_file(Path(token_file))
    try:
        stored: dict[str, Any] = read_object(sidecar)
        record({"level": a_text, "characters": a_text, "num_tokens": a_count, "dtype": a_text})(stored)
        vocabulary = Vocabulary(stored["level"], stored["characters"])
        expected, length = stored["num_tokens"], len(TokenFile(token_file, stored["dtype"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"the vocabulary {sidecar} cannot be read", expected="what encode_text_file wrote", got=error
        ) from error
    if expected != length:
        raise DataError(
            f"the vocabulary {sidecar} belongs to another token file",
            expected=f"{expected} tokens",
            got=f"{length} tokens in {token_file}",
        )
    return vocabulary


def _characters(path: Path) -> str:
    characters: set[str] = set()
    for piece in _pieces(path):
        characters.update(piece)
    return "".join(sorted(characters))


def _pieces(path: Path) -> Iterator[str]:
    """The text in pieces, newlines as they are; a character is never cut in two."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield decoder.decode(chunk)
        decoder.decode(b"", final=True)


def _tokens(path: Path, vocabulary: Vocabulary) -> Iterator[bytes]:
    dtype = np.dtype(vocabulary.dtype).newbyteorder("<")
    if vocabulary.level == "char":
        for piece in _pieces(path):
            yield vocabulary.encode(piece).astype(dtype).tobytes()
        return
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield np.frombuffer(chunk, np.uint8).astype(dtype).tobytes()


def _write_both(path: Path, out: Path, vocabulary: Vocabulary) -> None:
    digest, size = hashlib.sha256(), 0
    with atomic_file(out) as file:
        for piece in _tokens(path, vocabulary):
            digest.update(piece)
            size += file.write(piece)
        if not size:
            raise DataError(f"{path} is empty", expected="a text")
        stored = {
            "level": vocabulary.level,
            "dtype": vocabulary.dtype,
            "vocab_size": vocabulary.size,
            "num_tokens": size // np.dtype(vocabulary.dtype).itemsize,
            "sha256": digest.hexdigest(),
            "characters": vocabulary.characters,
        }
        # between the tokens' sync and their rename: a full disk changes neither file
        file.flush()
        os.fsync(file.fileno())
        write_bytes(vocabulary_file(out), json.dumps(stored, indent=1).encode())
