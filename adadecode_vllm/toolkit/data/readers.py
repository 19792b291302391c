# SPDX-License-Identifier: Apache-2.0
"""Records of input files: JSON Lines, JSON, Parquet and plain text.

Readers yield one record at a time, so that a file need not fit in memory. Nothing here
knows what the records mean; see `adadecode_vllm.toolkit.data.tasks`.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from adadecode_vllm.errors import AdaDecodeError, first_line

DATA_SUFFIXES: Final = (".jsonl", ".jsonl.gz", ".json", ".parquet")
TEXT_SUFFIX: Final = ".txt"

#: The field under which a text file's whole content is given.
WHOLE_TEXT: Final = ""


@dataclass(frozen=True)
class Record:
    """One record of a file.

    Attributes:
        values: Its fields; those of a text file are `{WHOLE_TEXT: text}`.
        place: Where it is, for messages: `file:line`, or `file, row n`.
    """

    values: Mapping[str, Any]
    place: str

    def text(self, field: str) -> str:
        """Return a field that must be text.

        Args:
            field: The field's name.

        Returns:
            The text, which may be empty.

        Raises:
            AdaDecodeError: The field is missing or is something else.
        """
        value = self._get(field)
        if not isinstance(value, str):
            raise AdaDecodeError(
                f"--input {self.place}: the field {field!r} is "
                f"{type(value).__name__} instead of text; correct the record, or give "
                "the right --task or --field"
            )
        return self._whole(field, value)

    def texts(self, field: str) -> list[str]:
        """Return a field that must be a list of texts; errors as `text`."""
        value = self._get(field)
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise AdaDecodeError(
                f"--input {self.place}: the field {field!r} is not a list of texts; "
                "correct the record, or give the right --task"
            )
        return [self._whole(field, text) for text in value]

    def integer(self, field: str) -> int:
        """Return a field that must be an integer; errors as `text`."""
        value = self._get(field)
        if isinstance(value, bool) or not isinstance(value, int):
            raise AdaDecodeError(
                f"--input {self.place}: the field {field!r} is not an integer; correct "
                "the record, or give the right --task"
            )
        return value

    def _whole(self, field: str, text: str) -> str:
        """JSON allows half of a character that takes two code units."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise AdaDecodeError(
                f"--input {self.place}: the field {field!r} has half a character, "
                f"{text[error.start]!a}; correct the record"
            ) from None
        return text

    def _get(self, field: str) -> Any:
        if field in self.values:
            return self.values[field]
        if WHOLE_TEXT in self.values:
            reason = "a text file has no fields"
        else:
            names = ", ".join(sorted(self.values)) or "none"
            reason = f"there is no field {field!r}, the record's fields are {names}"
        raise AdaDecodeError(
            f"--input {self.place}: {reason}; give the right --task or --field"
        )


def suffix_of(path: Path) -> str | None:
    """Return the known extension that a file's name ends with, or None."""
    name = path.name.lower()
    for suffix in (*DATA_SUFFIXES, TEXT_SUFFIX):
        if name.endswith(suffix) and len(name) > len(suffix):
            return suffix
    return None


def list_files(
    inputs: Sequence[Path], suffixes: Sequence[str]
) -> list[tuple[Path, bool]]:
    """Find the input files.

    Args:
        inputs: Files, and directories to search with all below them. In a directory,
            files with other extensions and hidden ones are passed over.
        suffixes: The extensions that are wanted.

    Returns:
        The files in the order of `inputs`, those of a directory by their path, each
        with whether it was named itself, not found in a directory.

    Raises:
        AdaDecodeError: A path is missing, a directory holds no such file, or a file
            has another extension.
    """
    known = ", ".join(suffixes)
    files: list[tuple[Path, bool]] = []
    for path in inputs:
        if path.is_dir():
            found = sorted(
                file
                for file in path.rglob("*")
                if suffix_of(file) in suffixes
                and file.is_file()
                and not any(p.startswith(".") for p in file.relative_to(path).parts)
            )
            if not found:
                raise AdaDecodeError(
                    f"--input {path}: the directory holds no file with an extension "
                    f"of {known}; give the directory with the data"
                )
            files.extend((file, False) for file in found)
        elif not path.exists():
            raise AdaDecodeError(
                f"--input {path}: there is no such file or directory; check the path"
            )
        elif suffix_of(path) not in suffixes:
            raise AdaDecodeError(
                f"--input {path}: unknown extension; rename or convert it to one of "
                f"{known}"
            )
        else:
            files.append((path, True))
    return files


def read_records(path: Path, columns: Iterable[str] | None = None) -> Iterator[Record]:
    """Read a file record by record.

    Args:
        path: The file; its extension says what it is. A `.txt` file is one record,
            blank lines and all. Blank lines of JSON Lines are passed over.
        columns: The fields that are wanted, where not all; only Parquet gains from it,
            and fields that are missing are left to `Record` to complain about.

    Yields:
        The records in the file's order.

    Raises:
        AdaDecodeError: The file cannot be read, a line or the file is not what its
            extension says, or there is nothing in it.
    """
    suffix = suffix_of(path)
    reader = {
        ".jsonl": _read_jsonl,
        ".jsonl.gz": _read_jsonl,
        ".json": _read_json,
        TEXT_SUFFIX: _read_text,
    }.get(suffix or "")
    empty = True
    try:
        if suffix == ".parquet":
            records = _read_parquet(path, columns)
        elif reader is not None:
            records = reader(path)
        else:
            raise AdaDecodeError(f"--input {path}: unknown extension; convert the file")
        for record in records:
            empty = False
            yield record
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise AdaDecodeError(
            f"--input {path}: not a whole gzip file ({error}); copy or download it "
            "again"
        ) from error
    except OSError as error:
        raise AdaDecodeError(
            f"--input {path}: it cannot be read ({error.strerror or error}); check the "
            "file and its permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise AdaDecodeError(
            f"--input {path}: not UTF-8 ({error.reason}); convert the file to UTF-8"
        ) from error
    if empty:
        raise AdaDecodeError(
            f"--input {path}: the file is empty; remove it or give another one"
        )


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's content in hex.

    Args:
        path: The file.

    Raises:
        AdaDecodeError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise AdaDecodeError(
            f"--input {path}: it cannot be read ({error.strerror}); check the file and "
            "its permissions"
        ) from error


def _read_jsonl(path: Path) -> Iterator[Record]:
    """One JSON object a line, plain or compressed with gzip."""
    compressed = path.name.lower().endswith(".gz")
    with path.open("rb") as raw, gzip.open(raw) if compressed else raw as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            yield Record(_object(line, f"{path}:{number}"), f"{path}:{number}")


def _read_json(path: Path) -> Iterator[Record]:
    """One JSON array of objects."""
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise AdaDecodeError(
            f"--input {path}: not JSON ({error}); correct the file, or name it .jsonl "
            "if it has an object a line"
        ) from error
    if not isinstance(values, list):
        raise AdaDecodeError(
            f"--input {path}: not a JSON array; give an array of objects, or JSON Lines"
        )
    for number, value in enumerate(values):
        place = f"{path}, element {number}"
        if not isinstance(value, dict):
            raise AdaDecodeError(
                f"--input {place}: not a JSON object; correct or remove it"
            )
        yield Record(value, place)


def _read_parquet(path: Path, columns: Iterable[str] | None) -> Iterator[Record]:
    """The rows of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = None if columns is None else [c for c in names if c in columns]
            # Without any of the columns the names are still needed, for the message.
            number = 0
            for batch in file.iter_batches(1024, columns=wanted or None):
                for values in batch.to_pylist():
                    yield Record(values, f"{path}, row {number}")
                    number += 1
    except pa.ArrowException as error:
        raise AdaDecodeError(
            f"--input {path}: not a whole Parquet file ({first_line(error)}); copy or "
            "download it again"
        ) from error


def _read_text(path: Path) -> Iterator[Record]:
    """The file's whole text, unless there is none."""
    text = path.read_text(encoding="utf-8")
    if text:
        yield Record({WHOLE_TEXT: text}, str(path))


def _object(line: bytes, place: str) -> dict[str, Any]:
    """Parse a line that must be a JSON object."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise AdaDecodeError(
            f"--input {place}: not JSON ({error}); correct or remove the line"
        ) from error
    if not isinstance(value, dict):
        raise AdaDecodeError(
            f"--input {place}: not a JSON object; correct or remove the line"
        )
    return value
