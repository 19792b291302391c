# SPDX-License-Identifier: Apache-2.0
"""The Parquet shards of a data directory: writing, checking and reading rows.

Shard k holds the rows [k * n, (k + 1) * n) for a fixed n, the last one fewer. Each is
written under a temporary name and renamed, so that a shard is whole or not there. Its
footer names the request that it belongs to: what another run left behind is never
mistaken for this one's. Answers of a shard that is not whole yet are in its journal.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adadecode_vllm.errors import AdaDecodeError, first_line
from adadecode_vllm.files import remove_left_overs, writing
from adadecode_vllm.toolkit.data.info import (
    INFO_FILE,
    DatasetInfo,
    data_error,
    read_info,
    write_info,
)
from adadecode_vllm.toolkit.data.journal import Journals

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:
    # Every command that makes or reads data comes by here.
    raise AdaDecodeError(
        f"adadecode: pyarrow, which the data needs, is not installed ({error}); "
        "install the extra `train`, as in pip install 'adadecode-vllm[train]'"
    ) from error

SCHEMA = pa.schema(
    [
        pa.field("row_id", pa.int64(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("response_ids", pa.list_(pa.int32()), nullable=False),
    ]
)

_SHARD_NAME = re.compile(r"part-(\d{5,})\.parquet")
_WRITTEN = re.compile(rf"{re.escape(INFO_FILE)}|{_SHARD_NAME.pattern}")
_REQUEST_KEY = b"adadecode.request"
_AGAIN = "run `adadecode data` again with --overwrite"


class DataRow(NamedTuple):
    """One training sequence.

    Attributes:
        row_id: Its place in the data set, from 0.
        source: Where it came from: a task and split, or a file.
        prompt_ids: Token ids of the prompt; empty for finished text.
        response_ids: Token ids of the answer with its end-of-sequence token where the
            model gave one, or of the whole finished text.
    """

    row_id: int
    source: str
    prompt_ids: list[int]
    response_ids: list[int]


def shard_name(index: int) -> str:
    """Return the file name of shard `index`."""
    return f"part-{index:05d}.parquet"


def shard_files(directory: Path) -> dict[int, Path]:
    """Find the files that have a shard's name.

    Args:
        directory: Any directory.

    Returns:
        Paths by the number of the shard, in order.
    """
    found = {}
    for path in directory.iterdir():
        if match := _SHARD_NAME.fullmatch(path.name):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def shard_request(path: Path) -> str | None:
    """Which request a shard belongs to.

    Args:
        path: A file.

    Returns:
        `sources["request"]` of its data set; empty for a Parquet file that
        `adadecode data` did not write, None for one that cannot be read.
    """
    try:
        with pq.ParquetFile(path) as file:
            return _request_of(file)
    except (OSError, pa.ArrowException):
        return None


def _request_of(file: Any) -> str:
    """What the footer of an open Parquet file says; empty where it says nothing."""
    found = (file.schema_arrow.metadata or {}).get(_REQUEST_KEY, b"")
    return found.decode(errors="replace")


def rows_fingerprint(rows: Iterable[DataRow]) -> str:
    """Hash the token ids of rows in their order.

    Args:
        rows: The rows; `source` does not enter.

    Returns:
        SHA-256 in hex over, per row, the two lengths and the ids of prompt and
        answer, all as little-endian int32.
    """
    digest = hashlib.sha256()
    for row in rows:
        lengths = [len(row.prompt_ids), len(row.response_ids)]
        values = [*lengths, *row.prompt_ids, *row.response_ids]
        digest.update(np.array(values, "<i4").tobytes())
    return digest.hexdigest()


def load_dataset_info(
    directory: str | PathLike[str], flag: str = "--data"
) -> DatasetInfo:
    """Check a data directory and return its description; reads only shards' footers.

    Args:
        directory: What `adadecode data` wrote.
        flag: The option that named it, for messages.

    Returns:
        The description. The data set is complete: all shards are there and together
        have `rows` rows.

    Raises:
        AdaDecodeError: The directory cannot be used: missing, incomplete, of another
            format version, with missing or damaged shards.
    """
    directory = Path(directory)
    info = read_info(directory, flag)
    if not info.complete:
        raise data_error(
            directory,
            "the data is incomplete because its making was interrupted",
            "run the same `adadecode data` command again to finish it",
            flag,
        )
    found = 0
    for path in _shards(directory, flag):
        found += _open(path, directory, flag).metadata.num_rows
    if found != info.rows:
        raise data_error(
            directory,
            f"its shards hold {found:,} rows instead of {info.rows:,}",
            f"restore the missing files, or {_AGAIN}",
            flag,
        )
    return info


def read_rows(
    directory: str | PathLike[str], flag: str = "--data"
) -> Iterator[DataRow]:
    """Read the rows of a data directory in order.

    Args:
        directory: A directory that `load_dataset_info` accepts.
        flag: The option that named it, for messages.

    Yields:
        Rows by increasing `row_id`, starting at 0; one shard is in memory at a time.

    Raises:
        AdaDecodeError: As `load_dataset_info`, or rows are damaged, missing or double.
    """
    directory = Path(directory)
    request = str(load_dataset_info(directory, flag).sources.get("request", ""))
    expected = 0
    for path in _shards(directory, flag):
        for row in _read_shard(path, directory, flag, request):
            if row.row_id != expected:
                raise data_error(
                    directory,
                    f"{path.name} has row {row.row_id} where {expected} belongs",
                    _AGAIN,
                    flag,
                )
            expected += 1
            yield row


class ShardWriter:
    """Writes a data directory shard by shard, in any order, and resumes.

    Args:
        directory: The data directory; created with its parents if missing.
        info: Its description with `complete=False`; written to `dataset.json` at once
            unless an earlier run of the same request did.
        rows_per_shard: Rows of every shard but the last.

    Attributes:
        num_shards: Shards of the complete data set.
        journals: The answers of shards that are not whole yet.
    """

    def __init__(
        self, directory: str | PathLike[str], info: DatasetInfo, rows_per_shard: int
    ) -> None:
        self.directory = Path(directory)
        self.info = info.model_copy(update={"complete": False, "fingerprint": ""})
        self.rows_per_shard = rows_per_shard
        self.num_shards = -(-info.rows // rows_per_shard)
        self._request = str(info.sources.get("request", ""))
        self.directory.mkdir(parents=True, exist_ok=True)
        remove_left_overs(self.directory, _WRITTEN)
        write_info(self.directory, self.info)
        self.journals = Journals(self.directory, self._request, info.vocab_size)

    def shard_rows(self, index: int) -> range:
        """Return the row ids of shard `index`."""
        start = index * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.info.rows))

    def missing_shards(self) -> list[int]:
        """Return the shards that are still to be written, in order.

        A damaged shard, one of another request or one with another number of rows
        counts as missing.
        """
        return [i for i in range(self.num_shards) if not self._is_written(i)]

    def write(self, index: int, rows: Sequence[DataRow]) -> None:
        """Write shard `index`; it appears under its name only when it is whole.

        Args:
            index: The shard, in [0, num_shards).
            rows: Its rows, in the order of `shard_rows(index)`.

        Raises:
            ValueError: The row ids are not those of the shard.
            OSError: The file cannot be written.
        """
        if [row.row_id for row in rows] != list(self.shard_rows(index)):
            raise ValueError(f"shard {index} needs the rows {self.shard_rows(index)}")
        schema = SCHEMA.with_metadata({_REQUEST_KEY: self._request.encode()})
        table = pa.Table.from_pylist([row._asdict() for row in rows], schema=schema)
        with writing(self.directory / shard_name(index)) as temporary:
            pq.write_table(table, temporary, compression="zstd")
        self.journals.remove(index)

    def finish(self) -> DatasetInfo:
        """Declare the data set complete.

        Returns:
            The description that `dataset.json` now holds, with the fingerprint and
            `sources["tokens"]`: numbers of tokens in prompts and in answers.

        Raises:
            RuntimeError: Shards are missing.
            AdaDecodeError: A shard cannot be read back.
        """
        if missing := self.missing_shards():
            raise RuntimeError(f"shards {missing} have not been written")
        tokens = {"prompt": 0, "response": 0}

        def counted() -> Iterator[DataRow]:
            for path in self._paths():
                for row in _read_shard(path, self.directory, "OUT", self._request):
                    tokens["prompt"] += len(row.prompt_ids)
                    tokens["response"] += len(row.response_ids)
                    yield row

        fingerprint = rows_fingerprint(counted())
        self.info = self.info.model_copy(
            update={
                "complete": True,
                "fingerprint": fingerprint,
                "sources": {**self.info.sources, "tokens": tokens},
            }
        )
        write_info(self.directory, self.info)
        return self.info

    def _paths(self) -> list[Path]:
        return [self.directory / shard_name(i) for i in range(self.num_shards)]

    def _is_written(self, index: int) -> bool:
        """Whether a shard is there, whole, and of this request."""
        path = self.directory / shard_name(index)
        if shard_request(path) != self._request:
            return False
        with pq.ParquetFile(path) as file:
            return file.metadata.num_rows == len(self.shard_rows(index))


def _shards(directory: Path, flag: str) -> list[Path]:
    """The shards in order, none missing between the first and the last."""
    shards = shard_files(directory)
    for index in range(len(shards)):
        if index not in shards:
            raise data_error(
                directory,
                f"{shard_name(index)} is missing",
                f"restore the file, or {_AGAIN}",
                flag,
            )
    return list(shards.values())


def _open(path: Path, directory: Path, flag: str) -> Any:
    """Open a shard and check its columns; an `AdaDecodeError` otherwise."""
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise data_error(
            directory,
            f"{path.name} cannot be read ({first_line(error)})",
            f"restore the file, or {_AGAIN}",
            flag,
        ) from error
    if not file.schema_arrow.equals(SCHEMA):
        raise data_error(
            directory,
            f"{path.name} has other columns than row_id, source, prompt_ids and "
            "response_ids",
            "give the directory that `adadecode data` wrote",
            flag,
        )
    return file


def _read_shard(
    path: Path, directory: Path, flag: str, request: str
) -> Iterator[DataRow]:
    """Yield the rows of one shard of a request."""
    with _open(path, directory, flag) as file:
        if _request_of(file) != request:
            raise data_error(
                directory,
                f"{path.name} belongs to other data, which perhaps took the place of "
                "these while they were read",
                f"give the same command again, or {_AGAIN}",
                flag,
            )
        try:
            batches = list(file.iter_batches())
        except (OSError, pa.ArrowException) as error:
            raise data_error(
                directory,
                f"{path.name} is damaged ({first_line(error)})",
                f"restore the file, or {_AGAIN}",
                flag,
            ) from error
    for batch in batches:
        columns = (batch.column(name).to_pylist() for name in SCHEMA.names)
        for values in zip(*columns, strict=True):
            yield DataRow(*values)
