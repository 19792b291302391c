# SPDX-License-Identifier: Apache-2.0
"""The data directory: round trips, what is trusted, and every refusal's sentence."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.toolkit.data.info import DatasetInfo
from adadecode_vllm.toolkit.data.shards import (
    SCHEMA,
    DataRow,
    ShardWriter,
    load_dataset_info,
    read_rows,
    rows_fingerprint,
)

INFO = DatasetInfo(
    model="tiny",
    vocab_size=50,
    rows=7,
    complete=False,
    sources={"request": "abc"},
    created="2026-01-01T00:00:00+00:00",
)


def make_rows(number: int = 7) -> list[DataRow]:
    return [
        DataRow(i, "made up", list(range(i % 3)), [i, 49, 0][: 1 + i % 3])
        for i in range(number)
    ]


def write(directory: Path, rows: list[DataRow], per_shard: int = 3) -> DatasetInfo:
    info = INFO.model_copy(update={"rows": len(rows)})
    writer = ShardWriter(directory, info, per_shard)
    for index in reversed(range(writer.num_shards)):
        shard = writer.shard_rows(index)
        writer.write(index, rows[shard.start : shard.stop])
    return writer.finish()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write(tmp_path / "data", make_rows())
    return tmp_path / "data"


ids = st.lists(st.integers(0, 49), max_size=5)


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.tuples(ids, ids), min_size=1, max_size=12),
    per_shard=st.integers(1, 13),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, texts: list[Any], per_shard: int
) -> None:
    directory = tmp_path_factory.mktemp("data") / "new" / "one"
    rows = [DataRow(i, "x", prompt, text) for i, (prompt, text) in enumerate(texts)]
    info = write(directory, rows, per_shard)
    assert info.complete
    assert info.fingerprint == rows_fingerprint(rows)
    assert load_dataset_info(directory) == info
    assert list(read_rows(directory)) == rows
    assert len(list(directory.iterdir())) == 1 + -(-len(rows) // per_shard)


def test_format(data: Path) -> None:
    """What other programs may rely on."""
    assert sorted(path.name for path in data.iterdir()) == [
        "dataset.json",
        *(f"part-0000{i}.parquet" for i in range(3)),
    ]
    table = pq.read_table(data / "part-00001.parquet")
    assert table.schema.equals(SCHEMA)
    assert table["row_id"].to_pylist() == [3, 4, 5]
    values = json.loads((data / "dataset.json").read_text())
    assert values["format_version"] == 1
    assert values["rows"] == 7
    assert values["complete"] is True
    assert values["sources"]["tokens"] == {"prompt": 6, "response": 13}
    assert list(values) == [
        *("format_version", "model", "vocab_size", "rows", "complete"),
        *("fingerprint", "sources", "argv", "versions", "created"),
    ]


def test_fingerprint_tells_rows_apart() -> None:
    rows = make_rows()
    other = [rows[0]._replace(response_ids=[1]), *rows[1:]]
    moved = [DataRow(0, "x", [1], [2, 3])]
    prints = {
        rows_fingerprint(r)
        for r in (rows, other, rows[::-1], moved, [DataRow(0, "x", [1, 2], [3])])
    }
    assert len(prints) == 5
    # Fixed: caches and run files hold it.
    expected = hashlib.sha256(struct.pack("<5i", 1, 2, 1, 2, 3)).hexdigest()
    assert rows_fingerprint(moved) == expected


# Resuming


def test_missing_shards(tmp_path: Path) -> None:
    rows = make_rows()
    writer = ShardWriter(tmp_path, INFO, 3)
    assert writer.missing_shards() == [0, 1, 2]
    writer.write(1, rows[3:6])
    assert ShardWriter(tmp_path, INFO, 3).missing_shards() == [0, 2]
    with pytest.raises(AdaDecodeError, match=r"incomplete .* run the same `adadecode"):
        load_dataset_info(tmp_path)
    # Damage and strangers' shards count as missing.
    path = tmp_path / "part-00001.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    assert writer.missing_shards() == [0, 1, 2]
    writer.write(1, rows[3:6])
    other = INFO.model_copy(update={"sources": {"request": "other"}})
    assert ShardWriter(tmp_path, other, 3).missing_shards() == [0, 1, 2]
    assert ShardWriter(tmp_path, INFO, 2).missing_shards() == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match=r"shards \[0, 2\] have not been written"):
        writer.finish()


def test_wrong_rows_are_a_defect(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, INFO, 3)
    with pytest.raises(ValueError, match=r"shard 0 needs the rows range\(0, 3\)"):
        writer.write(0, make_rows()[1:4])
    assert writer.missing_shards() == [0, 1, 2]


def test_a_failed_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = ShardWriter(tmp_path, INFO, 3)
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        writer.write(0, make_rows()[:3])
    assert [path.name for path in tmp_path.iterdir()] == ["dataset.json"]


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    left = tmp_path / f"part-00000.parquet.tmp-99999999-{0:016}"
    other = tmp_path / f"part-00001.parquet.tmp-{os.getpid()}-{0:016}"
    for path in (left, other):
        path.write_text("half")
    ShardWriter(tmp_path, INFO, 3)
    assert not left.exists()
    assert other.exists()  # of a process that may still be writing


# Refusals


def edit(**values: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "dataset.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def put(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_bytes(content)


def other_columns(directory: Path) -> None:
    pq.write_table(pa.table({"x": [1, 2, 3]}), directory / "part-00001.parquet")


REFUSALS = [
    pytest.param(
        lambda d: (d / "dataset.json").unlink(), "dataset.json is missing", id="no info"
    ),
    pytest.param(put("dataset.json", b"{"), "dataset.json is not JSON (", id="no JSON"),
    pytest.param(put("dataset.json", b"\xff"), "is not JSON (", id="no UTF-8"),
    pytest.param(put("dataset.json", b"[]"), "is not a JSON object", id="a list"),
    pytest.param(
        edit(format_version=2),
        "has format_version 2 and this package reads 1; install",
        id="a newer format",
    ),
    pytest.param(edit(format_version=None), "format_version None", id="no format"),
    pytest.param(edit(rows=0), "is invalid: rows: ", id="no rows"),
    pytest.param(edit(extra=0), "is invalid: extra: ", id="unknown key"),
    pytest.param(edit(fingerprint="x"), "is invalid: fingerprint: ", id="no hash"),
    pytest.param(
        edit(complete=False), "incomplete because its making was", id="incomplete"
    ),
    pytest.param(
        lambda d: (d / "part-00001.parquet").unlink(),
        "part-00001.parquet is missing; restore the file, or run",
        id="a shard is missing",
    ),
    pytest.param(
        lambda d: (d / "part-00002.parquet").unlink(),
        "its shards hold 6 rows instead of 7",
        id="the last shard is missing",
    ),
    pytest.param(
        put("part-00000.parquet", b"PAR1"),
        "part-00000.parquet cannot be read (",
        id="a damaged shard",
    ),
    pytest.param(
        other_columns, "part-00001.parquet has other columns", id="other columns"
    ),
]


@pytest.mark.parametrize(("damage", "message"), REFUSALS)
def test_refusal(data: Path, damage: Callable[[Path], object], message: str) -> None:
    load_dataset_info(data)
    damage(data)
    for read in (load_dataset_info, lambda d: list(read_rows(d))):
        with pytest.raises(AdaDecodeError) as caught:
            read(data)
        text = str(caught.value)
        assert message in text
        assert text.startswith(f"--data {data}: ")
        assert "\n" not in text
        assert "; " in text  # the remedy


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(AdaDecodeError, match="the path does not exist; give the"):
        load_dataset_info(tmp_path / "no")
    (tmp_path / "file").touch()
    with pytest.raises(AdaDecodeError, match=r"--train-data .* is not a directory"):
        load_dataset_info(tmp_path / "file", "--train-data")


def test_double_rows(data: Path) -> None:
    (data / "part-00002.parquet").unlink()
    (data / "part-00002.parquet").write_bytes(
        (data / "part-00000.parquet").read_bytes()
    )
    edit(rows=9)(data)
    rows = read_rows(data)
    with pytest.raises(AdaDecodeError, match=r"part-00002\.parquet has row 0 where 6"):
        list(rows)


def test_a_damaged_column(data: Path) -> None:
    path = data / "part-00000.parquet"
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)
    path.write_bytes(content)
    load_dataset_info(data)  # reads footers only
    with pytest.raises(AdaDecodeError, match=r"part-00000\.parquet is damaged \("):
        list(read_rows(data))


def test_shards_that_others_replaced_while_they_were_read(data: Path) -> None:
    rows = read_rows(data)
    assert next(rows).row_id == 0
    path = data / "part-00001.parquet"
    table = pq.read_table(path)
    metadata = {**table.schema.metadata, b"adadecode.request": b"another"}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    with pytest.raises(AdaDecodeError, match=r"part-00001\.parquet belongs to other"):
        list(rows)
