# SPDX-License-Identifier: Apache-2.0
"""`dataset.json` of a data directory: its schema, its reading, its writing.

Nothing here imports pyarrow or torch.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from adadecode_vllm.errors import AdaDecodeError, problems
from adadecode_vllm.files import atomic_write

INFO_FILE: Final = "dataset.json"
FORMAT_VERSION: Final = 1


class DatasetInfo(BaseModel):
    """What `dataset.json` says.

    Attributes:
        format_version: Always 1.
        model: The model whose tokenizer made the ids, as it was named.
        vocab_size: Rows of that model's LM head; every id is below it.
        rows: Rows of the finished data set.
        complete: Whether all of them have been written.
        fingerprint: SHA-256 in hex over the rows' ids in order (see
            `toolkit.data.shards.rows_fingerprint`); empty until complete.
        sources: What made the rows. `adadecode data` writes `request` (SHA-256 of
            all that decides the rows), `arguments`, `inputs`, `skipped` and, once
            complete, `tokens`.
        argv: The command's arguments.
        versions: Versions of the packages that took part.
        created: Start of the first run, ISO 8601 with time zone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format_version: Literal[1] = FORMAT_VERSION
    model: str
    vocab_size: PositiveInt
    rows: PositiveInt
    complete: bool
    fingerprint: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    sources: dict[str, Any] = Field(default_factory=dict)
    argv: list[str] = Field(default_factory=list)
    versions: dict[str, str] = Field(default_factory=dict)
    created: str


def data_error(
    directory: Path, reason: str, remedy: str, flag: str = "--data"
) -> AdaDecodeError:
    """Build the error for a data directory that cannot be used.

    Args:
        directory: What the user gave.
        reason: What is wrong, without a full stop.
        remedy: What to do about it, in the imperative.
        flag: The option it was given to.

    Returns:
        The error, to be raised by the caller.
    """
    return AdaDecodeError(f"{flag} {directory}: {reason}; {remedy}")


def read_info(directory: Path, flag: str = "--data") -> DatasetInfo:
    """Read `dataset.json`, complete or not, without looking at the shards.

    Args:
        directory: The data directory.
        flag: The option that named it, for messages.

    Returns:
        What the file says.

    Raises:
        AdaDecodeError: The directory or the file is missing, unreadable, damaged, or
            of another format version.
    """
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "does not exist"
        raise data_error(
            directory,
            f"the path {what}",
            "give the directory that `adadecode data` wrote",
            flag,
        )
    again = "run `adadecode data` again with --overwrite"
    try:
        values = json.loads((directory / INFO_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise data_error(
            directory,
            f"{INFO_FILE} is missing",
            "give the directory that `adadecode data` wrote",
            flag,
        ) from None
    except OSError as error:
        raise data_error(
            directory,
            f"{INFO_FILE} cannot be read ({error.strerror})",
            "check the file and its permissions",
            flag,
        ) from error
    except (ValueError, RecursionError) as error:  # bad JSON or bad UTF-8
        raise data_error(
            directory, f"{INFO_FILE} is not JSON ({error})", again, flag
        ) from error
    if not isinstance(values, dict):
        raise data_error(directory, f"{INFO_FILE} is not a JSON object", again, flag)
    return _parse(directory, values, flag)


def write_info(directory: Path, info: DatasetInfo) -> None:
    """Write `dataset.json` under a temporary name and rename it.

    Args:
        directory: The data directory; it exists.
        info: What to write.

    Raises:
        OSError: The file cannot be written.
    """
    text = info.model_dump_json(indent=2) + "\n"
    atomic_write(directory / INFO_FILE, text.encode())


def _parse(directory: Path, values: Mapping[str, Any], flag: str) -> DatasetInfo:
    """Validate the dictionary, with sentences instead of pydantic's report."""
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise data_error(
            directory,
            f"{INFO_FILE} has format_version {version!r} and this package reads "
            f"{FORMAT_VERSION}",
            "install the adadecode-vllm that wrote it, or write the data again",
            flag,
        )
    try:
        return DatasetInfo.model_validate(values)
    except ValidationError as error:
        raise data_error(
            directory,
            f"{INFO_FILE} is invalid: {', '.join(problems(error))}",
            "run `adadecode data` again with --overwrite",
            flag,
        ) from error
