# SPDX-License-Identifier: Apache-2.0
"""`adadecode data` replaces data at the end or not at all, and only its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count as numbers
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.toolkit.data import generate as generate_module
from adadecode_vllm.toolkit.data.make import make_data
from adadecode_vllm.toolkit.data.options import DataOptions
from adadecode_vllm.toolkit.data.place import alone
from adadecode_vllm.toolkit.data.shards import load_dataset_info, read_rows
from tests.data_directory import content
from tests.fake_answers import fail_after

pytestmark = pytest.mark.usefixtures("no_engine")


def other(options: DataOptions) -> DataOptions:
    return replace(options, max_new_tokens=50, rows_per_shard=4, overwrite=True)


@pytest.mark.parametrize("rows_done", [0, 1, 9, 19])
def test_old_data_stays_until_the_new_is_complete(
    options: DataOptions,
    asked: list[int],
    monkeypatch: pytest.MonkeyPatch,
    rows_done: int,
) -> None:
    old = make_data(options)
    before = content(options.out)
    with monkeypatch.context() as patch:
        patch.setattr(generate_module, "generate", fail_after(0, rows_done))
        with pytest.raises(RuntimeError, match="out of power"):
            make_data(other(options))
    assert load_dataset_info(options.out) == old
    assert before.items() <= content(options.out).items()
    # The same command, --overwrite included, goes on where it was.
    asked.clear()
    new = make_data(other(options))
    assert len(asked) == 20 - rows_done
    assert new.sources["arguments"]["max-new-tokens"] == 50
    assert load_dataset_info(options.out) == new
    assert len(list(read_rows(options.out))) == 20
    assert sorted(content(options.out)) == [
        *("dataset.json", *(f"part-0000{i}.parquet" for i in range(5)))
    ]


def test_an_unfinished_run_of_the_same_kind_is_continued_with_overwrite(
    options: DataOptions,
    asked: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = replace(options, overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(generate_module, "generate", fail_after(2, 1))
        with pytest.raises(RuntimeError):
            make_data(options)
    make_data(options)
    assert len(asked) == 20 - 7
    asked.clear()
    make_data(options)  # complete, and to be made again
    assert len(asked) == 20


def test_another_replacement_takes_the_place_of_an_unfinished_one(
    options: DataOptions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_data(options)
    with monkeypatch.context() as patch:
        patch.setattr(generate_module, "generate", fail_after(2))
        with pytest.raises(RuntimeError):
            make_data(other(options))
    third = replace(other(options), max_new_tokens=40)
    assert make_data(third).sources["arguments"]["max-new-tokens"] == 40
    assert len(list(read_rows(options.out))) == 20


@contextmanager
def interrupted_at(monkeypatch: pytest.MonkeyPatch, number: int) -> Iterator[None]:
    """Interrupt a block in place of the file move with this number, from 0."""
    move, calls = Path.replace, numbers()

    def interrupted(self: Path, target: Path) -> Path:
        if next(calls) == number:
            raise KeyboardInterrupt
        return move(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        yield


@pytest.mark.parametrize("at", range(16))
def test_replacing_may_be_interrupted_anywhere(
    options: DataOptions,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
) -> None:
    """7 shards and dataset.json go, 5 shards and dataset.json come."""
    old = make_data(options)
    with interrupted_at(monkeypatch, at):
        if at < 14:
            with pytest.raises(KeyboardInterrupt):
                make_data(other(options))
        else:
            make_data(other(options))
    if at == 0:
        assert load_dataset_info(options.out) == old
    # Also without --overwrite: the old data is on its way out.
    again = replace(other(options), overwrite=at == 0)
    new = make_data(again)
    assert load_dataset_info(options.out) == new
    assert new.sources["arguments"]["max-new-tokens"] == 50
    assert len(list(read_rows(options.out))) == 20
    assert len(content(options.out)) == 6


def foreign_shard(out: Path) -> None:
    pq.write_table(pa.table({"x": [1, 2, 3]}), out / "part-00000.parquet")


def unreadable_shard(out: Path) -> None:
    (out / "part-00099.parquet").write_text("mine")


def foreign_info(out: Path) -> None:
    (out / "dataset.json").write_text('[{"text": "a question"}]')


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("make", [foreign_shard, unreadable_shard, foreign_info])
def test_files_of_somebody_else_are_never_replaced(
    options: DataOptions,
    make: Callable[[Path], None],
    overwrite: bool,
) -> None:
    options.out.mkdir()
    make(options.out)
    before = content(options.out)
    with pytest.raises(AdaDecodeError, match=f"OUT {re.escape(str(options.out))}: "):
        make_data(replace(options, overwrite=overwrite))
    assert content(options.out) == before


def test_a_foreign_shard_among_data_of_ours_is_never_replaced(
    options: DataOptions,
) -> None:
    make_data(options)
    foreign_shard(options.out)
    before = content(options.out)
    for change in (options, other(options)):
        with pytest.raises(AdaDecodeError, match=r"holds part-00000\.parquet, which"):
            make_data(change)
    assert content(options.out) == before


def test_names_like_ours_are_left_alone(options: DataOptions) -> None:
    """An output directory that others use as well."""
    options.out.mkdir()
    temporary = f"x.tmp-99999999-{0:016}"
    names = ("notes.tmp-old", "part-a.parquet", temporary, "replacement")
    for name in names[:-1]:
        (options.out / name).write_text("mine")
    (options.out / "replacement").mkdir()
    (options.out / "replacement" / "a").write_text("mine")
    make_data(replace(options, overwrite=True))
    with pytest.raises(AdaDecodeError, match=r"its replacement, where .* other files"):
        make_data(other(options))
    (options.out / "replacement" / "a").unlink()
    make_data(other(options))
    assert len(list(read_rows(options.out))) == 20
    for name in names[:-1]:
        assert (options.out / name).read_text() == "mine"


def test_two_runs_do_not_write_to_one_directory(
    options: DataOptions,
) -> None:
    with (
        alone(options.out),
        pytest.raises(AdaDecodeError, match="another `adadecode data` is writing"),
    ):
        make_data(options)
    assert make_data(options).complete


@pytest.mark.parametrize("moves", [0, 3, 10])
def test_two_runs_do_not_replace_the_same_data(
    options: DataOptions, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    """Whether a replacement waits for its place, or is taking it."""
    make_data(options)
    with interrupted_at(monkeypatch, moves), pytest.raises(KeyboardInterrupt):
        make_data(other(options))
    if not moves:  # killed just before
        (options.out / "replacement" / "replaced").rmdir()
    before = content(options.out)
    with (
        alone(options.out),
        pytest.raises(AdaDecodeError, match="another `adadecode data` is writing"),
    ):
        make_data(other(options))
    assert content(options.out) == before
    new = make_data(other(options))
    assert load_dataset_info(options.out) == new
    assert new.sources["arguments"]["max-new-tokens"] == 50
    assert len(content(options.out)) == 6


@pytest.mark.parametrize("moves", [0, 3])
def test_a_replacement_that_cannot_take_its_place(
    options: DataOptions, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    """A sentence, when the command is given again too."""
    make_data(options)
    move, calls = Path.replace, iter(range(100))

    def full(self: Path, target: Path) -> Path:
        if self.parent == options.out and next(calls) >= moves:
            raise OSError(28, "No space left on device")
        return move(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        for _ in range(2):
            with pytest.raises(AdaDecodeError, match="No space left on device"):
                make_data(other(options))
    assert make_data(other(options)).complete
    assert len(content(options.out)) == 6
