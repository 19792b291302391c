# SPDX-License-Identifier: Apache-2.0
"""Files that are either whole or not there."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adadecode_vllm.files import (
    atomic_write,
    free_name,
    locked,
    remove_left_overs,
    without_temporary,
    writing,
    writing_together,
)


def content(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def interrupted() -> None:
        with writing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert content(tmp_path) == {"a": "old"}


def test_names_cannot_be_guessed_and_links_are_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    work = tmp_path / "work"
    work.mkdir()
    (work / f"a.tmp-{os.getpid()}").symlink_to(precious)
    (work / "a").symlink_to(precious)
    names = set()
    for _ in range(2):
        with writing(work / "a") as temporary:
            names.add(temporary.name)
            temporary.write_text("new")
    assert len(names) == 2
    assert all(without_temporary(name) == "a" for name in names)
    assert precious.read_text() == "mine"
    assert not (work / "a").is_symlink()
    assert (work / "a").read_text() == "new"


def test_a_name_that_exists_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even if the random part were known."""
    monkeypatch.setattr("secrets.token_hex", lambda count: "0" * 16)
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / f"a.tmp-{os.getpid()}-{'0' * 16}").symlink_to(precious)
    with pytest.raises(FileExistsError):
        atomic_write(tmp_path / "a", b"new")
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_permissions_are_those_of_any_new_file(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        (tmp_path / "ordinary").write_text("")
        atomic_write(tmp_path / "ours", b"")
        with writing(tmp_path / "tensors") as temporary:
            save_file({"a": torch.zeros(1)}, temporary)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {0o666 & ~mask}


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("at", range(4))
def test_files_are_replaced_together_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool, at: int
) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    if there:
        for path in paths:
            path.write_text(f"old {path.name}")
    before = content(tmp_path)
    rename, calls = os.rename, iter(range(100))

    def fail(source: Path, target: Path) -> None:
        if next(calls) == at:
            raise OSError("no")
        rename(source, target)

    def replace_all() -> None:
        with writing_together(paths) as temporary:
            for new in temporary:
                new.write_text("new")

    monkeypatch.setattr(os, "rename", fail)
    if there or at < 2:  # two renames where nothing is set aside
        with pytest.raises(OSError, match="no"):
            replace_all()
        assert content(tmp_path) == before
    replace_all()
    assert content(tmp_path) == {"a": "new", "b": "new"}


def test_left_overs_are_ours_and_of_dead_processes(tmp_path: Path) -> None:
    dead = 99999999
    keep = [
        f"a.tmp-{os.getpid()}-{'0' * 16}",  # somebody may still be writing
        "a.tmp-old",
        f"a.tmp-{dead}",
        f"notes.tmp-{dead}-{'0' * 16}",
        f"a.old-{dead}-{'0' * 16}",
        "a",
    ]
    for name in (*keep, f"a.tmp-{dead}-{'0' * 16}"):
        (tmp_path / name).write_text("")
    remove_left_overs(tmp_path, re.compile("a"))
    assert sorted(content(tmp_path)) == sorted(keep)


def test_a_directory_is_somebodys_for_a_block(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "directory"
    taken = RuntimeError("taken")
    with locked(directory, taken):
        with pytest.raises(RuntimeError, match="taken"), locked(directory, taken):
            pytest.fail("two have it")
        with locked(tmp_path, taken):
            pass  # another one
    with locked(directory, taken):
        assert content(directory) == {}


def test_a_free_name(tmp_path: Path) -> None:
    path = tmp_path / "a"
    assert free_name(path) == path
    path.symlink_to("nowhere")
    assert free_name(path) == tmp_path / "a2"
    (tmp_path / "a2").write_text("")
    assert free_name(path) == tmp_path / "a3"
