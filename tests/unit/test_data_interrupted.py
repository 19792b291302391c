# SPDX-License-Identifier: Apache-2.0
"""`adadecode data` loses neither answers nor files, whenever it is interrupted."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count as numbers
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.toolkit import progress as progress_module
from adadecode_vllm.toolkit.data import generate as generate_module
from adadecode_vllm.toolkit.data.command import Display
from adadecode_vllm.toolkit.data.generate import Answer, EngineSpec, Shards
from adadecode_vllm.toolkit.data.journal import Journals
from adadecode_vllm.toolkit.data.make import make_data
from adadecode_vllm.toolkit.data.options import DataOptions
from adadecode_vllm.toolkit.data.place import alone
from adadecode_vllm.toolkit.data.shards import load_dataset_info, read_rows
from tests.fake_answers import fail_after, fake_answers
from tests.harness import ROOT

pytestmark = pytest.mark.usefixtures("no_engine")

JOURNAL = "part-00000.unfinished.jsonl"


def content(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def whole(options: DataOptions) -> dict[str, bytes]:
    """The files of a run that nothing interrupted, without the times in them."""
    return made(options)


def made(options: DataOptions) -> dict[str, bytes]:
    out = options.out.with_name("whole")
    make_data(replace(options, out=out))
    return {n: b for n, b in content(out).items() if n != "dataset.json"}


def shards(directory: Path) -> dict[str, bytes]:
    return {n: b for n, b in content(directory).items() if n != "dataset.json"}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that an engine was asked for."""
    rows: list[int] = []

    def recording(spec: EngineSpec, wanted: Shards, on_tokens: Any) -> Any:
        for prompts in wanted.values():
            rows.extend(prompts)
        return fake_answers(spec, wanted, on_tokens)

    monkeypatch.setattr(generate_module, "generate", recording)
    return rows


# Answers are kept as they come


@pytest.mark.parametrize(
    ("number", "rows_per_shard"),
    [
        # One shard, never whole.
        (signal.SIGKILL, 20),
        (signal.SIGTERM, 20),
        (signal.SIGINT, 20),
        # Four whole ones of seven.
        (signal.SIGKILL, 3),
    ],
    ids=["SIGKILL", "SIGTERM", "SIGINT", "whole shards"],
)
def test_answers_survive_the_end_of_the_process(
    options: DataOptions,
    asked: list[int],
    number: signal.Signals,
    rows_per_shard: int,
) -> None:
    options = replace(options, rows_per_shard=rows_per_shard)
    expected = made(options)
    program = f"""
import sys, time
from pathlib import Path
from adadecode_vllm.toolkit.data import generate as g
from adadecode_vllm.toolkit.data.make import make_data
from adadecode_vllm.toolkit.data.options import DataOptions
from tests.fake_answers import fake_answers

def slowly(*args):
    for count, answer in enumerate(fake_answers(*args)):
        if count == 12:
            time.sleep(600)
        yield answer

g.check_options = lambda options: None
g.model_length = lambda spec: 256
g.generate = slowly
make_data(DataOptions(out=Path({str(options.out)!r}), model={options.model!r},
    inputs=(Path({str(options.inputs[0])!r}),), chat=False, max_new_tokens=100,
    rows_per_shard={rows_per_shard}))
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    journal = options.out / JOURNAL

    def twelve_are_kept() -> bool:
        if rows_per_shard == 3:
            return (options.out / "part-00003.parquet").exists()
        return journal.exists() and len(journal.read_bytes().splitlines()) >= 13

    deadline = time.monotonic() + 120
    while not twelve_are_kept():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) != 0
    with pytest.raises(AdaDecodeError, match="incomplete"):
        load_dataset_info(options.out)  # part of a shard is never read as data
    asked.clear()
    info = make_data(options)
    assert len(asked) == 8
    assert shards(options.out) == expected
    whole = load_dataset_info(options.out.with_name("whole"))
    assert info.fingerprint == whole.fingerprint


def test_a_torn_journal_keeps_what_is_whole(tmp_path: Path) -> None:
    rows = range(10, 14)
    path = tmp_path / "part-00003.unfinished.jsonl"
    answers = {10: [1, 2, 3], 12: [], 13: [49]}
    journals = Journals(tmp_path, "abc", 50)
    with journals.closing():
        for row, ids in answers.items():
            journals.add(3, rows, row, ids)
    data = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for size in range(len(data) + 1):
        for rest in (b"", b"\0" * 30, b"[11"):
            path.write_bytes(data[:size] + rest)
            lines = sum(end <= size for end in ends) - 1
            kept = dict(list(answers.items())[: max(0, lines)])
            journals = Journals(tmp_path, "abc", 50)
            assert journals.read(3, rows) == kept
            with journals.closing():
                journals.add(3, rows, 11, [7])
            assert journals.read(3, rows) == {**kept, 11: [7]}


@pytest.mark.parametrize(
    "line", ["[14,[1]]", "[10,[50]]", "[10,[-1]]", '[10,["1"]]', "[10,[true]]", "{}"]
)
def test_answers_that_cannot_be_ours_are_dropped(tmp_path: Path, line: str) -> None:
    header = json.dumps({"request": "abc"}, separators=(",", ":"))
    path = tmp_path / JOURNAL
    path.write_text(f"{header}\n[11,[1]]\n{line}\n[12,[1]]\n")
    assert Journals(tmp_path, "abc", 50).read(0, range(10, 14)) == {11: [1]}
    assert Journals(tmp_path, "other", 50).read(0, range(10, 14)) == {}


def test_a_journal_follows_no_link(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine\n")
    (tmp_path / JOURNAL).symlink_to(precious)
    journals = Journals(tmp_path, "abc", 50)
    with journals.closing():
        journals.add(0, range(3), 1, [4])
    assert precious.read_text() == "mine\n"
    assert journals.read(0, range(3)) == {1: [4]}


def test_a_shard_whose_answers_are_all_kept_needs_no_engine(
    options: DataOptions,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed between the last answer and the shard's file."""

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("adadecode_vllm.toolkit.data.shards.pq.write_table", full)
        with pytest.raises(AdaDecodeError) as caught:
            make_data(options)
    sentence = "writing failed (No space left on device); make room"
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    # The answers of the shard that could not be written are kept, too.
    assert sorted(content(options.out)) == ["dataset.json", JOURNAL]
    monkeypatch.setattr(generate_module, "generate", fail_after(0))
    with pytest.raises(RuntimeError):  # for the shards behind it
        make_data(options)
    assert set(shards(options.out)) == {"part-00000.parquet"}
    monkeypatch.setattr(generate_module, "generate", fake_answers)
    make_data(options)
    assert shards(options.out) == whole


# Data that is there is replaced at the end, or not at all


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
    names = ("notes.tmp-old", "part-a.parquet", "x.tmp-99999999", "replacement")
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


# Progress


def test_progress_without_a_terminal(
    options: DataOptions,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Lines come also while no row is done, and tell rate and time left."""
    monkeypatch.setattr(progress_module, "EVERY", 0.2)

    def slowly(
        spec: EngineSpec, wanted: Shards, on_tokens: Callable[[int], None]
    ) -> Iterator[Answer]:
        for count, answer in enumerate(fake_answers(spec, wanted, on_tokens)):
            time.sleep(0.5 if count in (0, 10) else 0.01)
            on_tokens(2)
            yield answer

    monkeypatch.setattr(generate_module, "generate", slowly)
    with Display() as display:
        make_data(options, display)
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"answers: 0 of 20 rows after 0 s", lines[0])
    middle = r"answers: 10 of 20 rows after \d s, \d+ tokens/s, \d s left"
    assert any(re.fullmatch(middle, line) for line in lines)
    assert re.fullmatch(r"answers: 20 of 20 rows after \d s, \d+ tokens/s", lines[-1])
    assert 4 <= len(lines) < 20
    assert not any("\r" in line or "\x1b" in line for line in lines)


def test_the_rate_leaves_the_start_of_the_engine_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Display() as display:
        display.start(4, 0)
        time.sleep(1.5)  # the engine starts
        began = time.time() - 0.5
        for _ in range(2):
            display.answered(1000, began)
    (line,) = capsys.readouterr().err.splitlines()
    match = re.fullmatch(
        r"answers: 2 of 4 rows after 2 s, ([\d,]+) tokens/s, (\d+) s left", line
    )
    assert match is not None, line
    assert 3000 < int(match[1].replace(",", "")) <= 4000
    assert match[2] in ("0", "1")


def test_a_continued_run_says_what_is_left(
    options: DataOptions,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(generate_module, "generate", fail_after(0, 7))
        with pytest.raises(RuntimeError):
            make_data(options)
    with Display() as display:
        make_data(options, display)
    assert display.rows == 13
    assert "answers: 20 of 20 rows" in capsys.readouterr().err


def test_a_standard_error_that_is_gone_does_not_end_the_run(
    options: DataOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in `adadecode data ... 2>&1 | head`."""

    class Gone:
        def isatty(self) -> bool:
            return False

        def write(self, text: str) -> None:
            raise BrokenPipeError(32, "Broken pipe")

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Gone())
        with Display() as display:
            assert make_data(options, display).complete
