# SPDX-License-Identifier: Apache-2.0
"""A file travels in parts and is whole again, or is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.harness import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu" / "parts.sh"


def parts(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, check=False
    )


@pytest.fixture
def sent(tmp_path: Path) -> tuple[Path, bytes]:
    """A directory with the parts of `model.gguf`, and what the file holds."""
    content = bytes(range(256)) * (5 << 11)
    (tmp_path / "model.gguf").write_bytes(content)
    assert parts("split", tmp_path / "model.gguf", tmp_path / "sent", 1).returncode == 0
    return tmp_path / "sent", content


def test_parts_are_joined(sent: tuple[Path, bytes]) -> None:
    directory, content = sent
    sizes = [part.stat().st_size for part in sorted(directory.glob("*.part-*"))]
    assert sizes == [1 << 20, 1 << 20, 1 << 19]
    for _ in range(2):  # what is there is left alone
        assert parts("join", directory, "model.gguf").returncode == 0
        assert (directory / "model.gguf").read_bytes() == content
    assert not list(directory.glob("*.part-*"))


def test_missing_and_damaged_parts_are_refused(sent: tuple[Path, bytes]) -> None:
    directory, _ = sent
    last = max(directory.glob("*.part-*"))
    last.write_bytes(b"x" + last.read_bytes()[1:])
    for _ in range(2):
        done = parts("join", directory, "model.gguf")
        assert done.returncode == 1
        assert "do not make the file; copy all of them" in done.stderr
        assert not (directory / "model.gguf").exists()
        last.unlink(missing_ok=True)


def test_other_calls_are_told_how() -> None:
    done = parts("send")
    assert done.returncode == 2
    assert "parts.sh split FILE OUT" in done.stderr
