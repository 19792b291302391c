# SPDX-License-Identifier: Apache-2.0
"""States that training keeps on disk: used again, continued, refused, made anew."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.files import locked
from adadecode_vllm.toolkit.states import cache as cache_module
from adadecode_vllm.toolkit.states import state_files
from adadecode_vllm.toolkit.states.teacher import Teacher
from tests.data_directory import write_rows
from tests.tiny import VOCAB_SIZE
from tests.training import Killed, train, weights_of


def _never(*_arguments: Any) -> Any:
    """Stands for passes of the model."""
    raise AssertionError("the cache should have been used")


def test_without_cache_the_weights_are_the_same(
    teacher: Teacher, data: Path, tmp_path: Path
) -> None:
    train(teacher, data, tmp_path / "cached")
    train(teacher, data, tmp_path / "live", cache=False)
    cached, live = weights_of(tmp_path / "cached"), weights_of(tmp_path / "live")
    for layer in (1, 2):
        torch.testing.assert_close(cached[layer], live[layer], rtol=1e-3, atol=1e-4)


def test_a_named_cache_serves_the_next_run(
    teacher: Teacher, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    train(teacher, data, tmp_path / "a", cache_directory=cache)
    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "streams", _never)
        train(teacher, data, tmp_path / "b", cache_directory=cache)
    a, b = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert all(torch.equal(a[layer], b[layer]) for layer in (1, 2))


def test_an_interrupted_cache_goes_on(
    teacher: Teacher, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same bits, whatever was written behind the last whole text."""
    computed: list[int] = []
    streams = Teacher.streams

    def until(most: int) -> None:
        def run(self: Teacher, sequences: Any, layers: Any) -> Any:
            if len(computed) + len(sequences) > most:
                raise Killed
            computed.extend(map(len, sequences))
            return streams(self, sequences, layers)

        monkeypatch.setattr(Teacher, "streams", run)

    train(teacher, data, tmp_path / "whole", cache_directory=tmp_path / "one")
    cache = tmp_path / "cache"
    options: dict[str, Any] = {"cache_directory": cache, "pass_tokens": 64}
    for most in (5, 14):
        until(most)
        with pytest.raises(Killed):
            train(teacher, data, tmp_path / "a", **options)
        index = cache / "index.jsonl"
        assert len(index.read_text().splitlines()) == len(computed) > 0
        with index.open("a") as file:
            file.write('{"text": "cut o')
        with (cache / "states.bin").open("ab") as file:
            file.write(b"more")
    until(1000)
    train(teacher, data, tmp_path / "a", **options)
    texts = len((cache / "index.jsonl").read_text().splitlines())
    assert len(computed) == texts, "no text was computed twice"
    until(0)
    train(teacher, data, tmp_path / "b", **options)
    a, b = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    whole = weights_of(tmp_path / "whole")
    for layer in (1, 2):
        assert torch.equal(a[layer], b[layer])
        torch.testing.assert_close(a[layer], whole[layer], rtol=1e-3, atol=1e-4)


def test_a_cache_grows_with_the_text(
    teacher: Teacher, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another selection of texts has computed is not computed again."""
    cache = tmp_path / "cache"
    train(teacher, data, tmp_path / "a", cache_directory=cache)
    before = (cache / "index.jsonl").read_text()
    other = write_rows(tmp_path / "d", [([3], [5] * 9)] * 20, vocab_size=VOCAB_SIZE)
    train(teacher, other, tmp_path / "b", cache_directory=cache)
    after = (cache / "index.jsonl").read_text()
    assert after.startswith(before)
    assert len(after.splitlines()) == len(before.splitlines()) + 1, "one text, 20 times"
    monkeypatch.setattr(Teacher, "streams", _never)
    train(teacher, data, tmp_path / "c", cache_directory=cache, held_out=0.4)


def test_two_runs_do_not_write_to_one_cache(
    teacher: Teacher, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"cache_directory": tmp_path / "cache"}
    free = cache_module.shutil.disk_usage

    def meanwhile(path: Path) -> Any:
        with pytest.raises(
            AdaDecodeError, match=r"--cache-dir.*another run is writing"
        ):
            train(teacher, data, tmp_path / "b", **options)
        return free(path)

    monkeypatch.setattr(cache_module.shutil, "disk_usage", meanwhile)
    train(teacher, data, tmp_path / "a", **options)


def test_a_cache_that_another_run_has_begun_is_left(
    teacher: Teacher, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both saw an empty directory."""
    options: dict[str, Any] = {"cache_directory": tmp_path / "cache"}
    begin = cache_module.begin

    def late(directory: Path, manifest: Any) -> None:
        monkeypatch.setattr(cache_module, "begin", begin)
        train(teacher, data, tmp_path / "a", **options)
        monkeypatch.setattr(Teacher, "streams", _never)
        begin(directory, manifest)

    monkeypatch.setattr(cache_module, "begin", late)
    train(teacher, data, tmp_path / "b", **options)
    a, b = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert all(torch.equal(a[layer], b[layer]) for layer in (1, 2))


def test_two_runs_do_not_begin_one_cache(
    teacher: Teacher, data: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    with (
        locked(cache, RuntimeError("not taken")),
        pytest.raises(AdaDecodeError, match=r"--cache-dir.*another run is writing"),
    ):
        train(teacher, data, tmp_path / "a", cache_directory=cache)
    assert list(cache.iterdir()) == []
    train(teacher, data, tmp_path / "a", cache_directory=cache)


def _shorten(cache: Path) -> None:
    states = cache / "states.bin"
    states.write_bytes(states.read_bytes()[:-4])


def _garble(cache: Path) -> None:
    (cache / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_shorten, "missing or damaged"),
        (_garble, "cannot be read"),
    ],
)
def test_a_damaged_cache_is_refused(
    teacher: Teacher,
    data: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    cache = tmp_path / "cache"
    train(teacher, data, tmp_path / "a", cache_directory=cache)
    damage(cache)
    with pytest.raises(AdaDecodeError, match=f"^--cache-dir [^(]*{message}"):
        train(teacher, data, tmp_path / "b", cache_directory=cache)


def test_a_cache_of_other_exits_is_refused(
    teacher: Teacher, data: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    train(teacher, data, tmp_path / "a", cache_directory=cache)
    with pytest.raises(AdaDecodeError, match="other exit layers"):
        train(teacher, data, tmp_path / "b", exit_layers=[3], cache_directory=cache)


@pytest.mark.parametrize("name", ["states.bin", "index.jsonl"])
def test_files_of_nobody_knows_whom_are_kept(
    teacher: Teacher, data: Path, tmp_path: Path, name: str
) -> None:
    """Their names alone do not make them a cache's."""
    directory = tmp_path / "cache"
    directory.mkdir()
    (directory / name).write_text("mine")
    with pytest.raises(AdaDecodeError, match=rf"it holds a file {re.escape(name)}, "):
        train(teacher, data, tmp_path / "a", cache_directory=directory)
    assert (directory / name).read_text() == "mine"


def test_removing_a_cache_ends_with_its_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted before, it is still known as one."""
    names = ["manifest.json", "states.bin", "index.jsonl", f"states.bin.tmp-1-{0:016x}"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    removed = []
    monkeypatch.setattr(Path, "unlink", lambda path: removed.append(path.name))
    state_files.clear(tmp_path)
    assert sorted(removed) == sorted(names)
    assert removed[-1] == "manifest.json"


def test_a_full_disk_is_told_before_writing(
    teacher: Teacher, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        cache_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000)
    )
    with pytest.raises(AdaDecodeError, match=r"--cache-dir.*GB free.*--no-cache"):
        train(teacher, data, tmp_path / "a")


def test_states_of_an_interrupted_run_are_used_again(
    teacher: Teacher, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of a run that is to replace heads, before its first epoch."""
    options: dict[str, Any]
    for options in ({}, {"overwrite": True, "learning_rate": 1e-3}):
        with pytest.raises(Killed):
            train(teacher, data, tmp_path, kill_at=2, **options)
        with monkeypatch.context() as patch:
            patch.setattr(Teacher, "streams", _never)
            train(teacher, data, tmp_path, **options)


def test_an_own_cache_that_does_not_fit_is_written_anew(
    teacher: Teacher, data: Path, tmp_path: Path
) -> None:
    other = write_rows(tmp_path / "d", [([], [5] * 9)] * 20, vocab_size=VOCAB_SIZE)
    output = tmp_path / "out"
    with pytest.raises(Killed):
        train(teacher, other, output, kill_at=1)
    cache = output / "run" / "cache"
    (cache / "states.bin").write_bytes(b"")
    with pytest.raises(Killed):
        train(teacher, other, output, kill_at=1)
    (cache / "manifest.json").write_text("{")
    train(teacher, data, output)


@pytest.mark.parametrize(
    "name", ["thesis.txt", "states-notes.bin", "manifest.json.mine", "a.tmp-b"]
)
def test_a_directory_with_other_files_is_no_cache(
    teacher: Teacher, data: Path, tmp_path: Path, name: str
) -> None:
    directory = tmp_path / "cache"
    directory.mkdir()
    (directory / name).write_text("mine")
    message = rf"--cache-dir .*it holds other files \({re.escape(name)}\)"
    with pytest.raises(AdaDecodeError, match=message):
        train(teacher, data, tmp_path / "out", cache_directory=tmp_path / "cache")
    assert (directory / name).read_text() == "mine"


def test_states_follow_no_link(
    teacher: Teacher, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    begin = cache_module.begin

    def plant(directory: Path, manifest: Any) -> None:
        """Somebody else puts a link there just before the file is made."""
        begin(directory, manifest)
        (directory / "states.bin").symlink_to(precious)

    monkeypatch.setattr(cache_module, "begin", plant)
    with pytest.raises(AdaDecodeError, match=r"--cache-dir .*writing failed"):
        train(teacher, data, tmp_path / "out", cache_directory=tmp_path / "cache")
    assert precious.read_text() == "mine"
