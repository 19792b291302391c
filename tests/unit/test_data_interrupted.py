# SPDX-License-Identifier: Apache-2.0
"""`adadecode data` keeps answers as they come, whenever it is interrupted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.toolkit.data import generate as generate_module
from adadecode_vllm.toolkit.data.journal import Journals
from adadecode_vllm.toolkit.data.make import make_data
from adadecode_vllm.toolkit.data.options import DataOptions
from adadecode_vllm.toolkit.data.shards import load_dataset_info
from tests.data_directory import content
from tests.fake_answers import fail_after, fake_answers
from tests.harness import ROOT

pytestmark = pytest.mark.usefixtures("no_engine")

JOURNAL = "part-00000.unfinished.jsonl"


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
