# SPDX-License-Identifier: Apache-2.0
"""The commands and the program of "get started" and "serve", run as they stand."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT, blocks, commands
from tests.server_process import serve

pytestmark = [pytest.mark.server, pytest.mark.slow]

SERVE = [command for block in blocks("docs/serve.md") for command in commands(block)]


def starting_with(program: str) -> list[str]:
    found = [command for command in SERVE if command.startswith(program)]
    assert found, program
    return found


def run(command: str, timeout: float = 120) -> str:
    """A command's output, with the programs of this environment."""
    programs = Path(sys.executable).parent
    done = subprocess.run(
        ["bash", "-c", command.replace(".venv/bin/", f"{programs}/")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_serve_send_and_watch(tmp_path: Path) -> None:
    """Served with eager layers, which starts sooner; all else as in the document."""
    first, _ = starting_with("scripts/run.sh .venv/bin/vllm serve")
    words = shlex.split(first)
    with serve(tmp_path / "log", *words[4:], model=words[3]) as server:
        requests = starting_with("curl")
        assert len(requests) == 2
        for request in requests:
            answer = json.loads(
                run(request.replace("http://localhost:8000", server.url))
            )
            assert answer["choices"][0]["text"]
        assert server.metric("vllm:adadecode_accepted_tokens_total") > 0
        (stats,) = starting_with(".venv/bin/adadecode stats")
        output = run(stats.replace("http://localhost:8000", server.url) + " --once")
        assert "accepted" in output


def test_the_program(tmp_path: Path) -> None:
    """Compiled, as in the document."""
    (code,) = (b.text for b in blocks("docs/get-started.md") if b.language == "python")
    program = tmp_path / "offline.py"
    program.write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1. " in done.stdout
    assert "accepted" in done.stdout
