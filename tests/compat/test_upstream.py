# SPDX-License-Identifier: Apache-2.0
"""docs/upstream.md: its diffs apply to vLLM 0.33.0, and its fault is still there."""

from __future__ import annotations

import ast
import io
import re
import shutil
import subprocess
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import vllm
from vllm.triton_utils import HAS_TRITON

from adadecode_vllm.compat import installed_version
from tests.documents import blocks

DOCUMENT = "docs/upstream.md"
VERSION = "0.33.0"
DIFFS = [block.text for block in blocks(DOCUMENT) if block.language == "diff"]
SOURCE = Path(vllm.__file__).parent


def files_of(diff: str) -> list[str]:
    return re.findall(r"^\+\+\+ b/vllm/(\S+)$", diff, re.MULTILINE)


@pytest.mark.skipif(installed_version() != VERSION, reason=f"written for {VERSION}")
@pytest.mark.parametrize("diff", DIFFS, ids=lambda diff: files_of(diff)[0])
def test_a_proposal_applies(diff: str, tmp_path: Path) -> None:
    for name in files_of(diff):
        copy = tmp_path / "vllm" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SOURCE / name, copy)
    done = subprocess.run(
        ["git", "apply", "--verbose", "-"],
        cwd=tmp_path,
        input=diff,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name in files_of(diff):
        changed = (tmp_path / "vllm" / name).read_text(encoding="utf-8")
        assert changed != (SOURCE / name).read_text(encoding="utf-8")
        ast.parse(changed)


@pytest.mark.skipif(HAS_TRITON, reason="the kernel itself runs")
def test_the_fault_is_as_reported() -> None:
    code, printed = (
        next(block.text for block in blocks(DOCUMENT) if block.language == language)
        for language in ("python", "")
    )
    with redirect_stdout(io.StringIO()) as out:
        exec(compile(code, DOCUMENT, "exec"), {})
    assert out.getvalue() == printed


@pytest.mark.skipif(HAS_TRITON, reason="the kernel itself runs")
def test_the_proposal_mends_it() -> None:
    """The proposed lines, run in place of vLLM's own."""
    (diff,) = (
        diff for diff in DIFFS if files_of(diff) == ["utils/cpu_triton_utils.py"]
    )
    added = [line[1:] for line in diff.splitlines() if re.match(r"\+(?!\+\+)", line)]
    import torch

    output = torch.full((5,), -1.0)
    names = {
        "torch": torch,
        "output": output,
        "input_val": torch.tensor([0.7, 7.0, 0.0]),
        "cu_num_tokens": torch.tensor([2, 2, 5], dtype=torch.int32),
        "replace_from": 0,
        "replace_to": 1,
    }
    body = "\n".join(line.removeprefix("    ") for line in added)
    exec(compile(body, DOCUMENT, "exec"), names)
    assert torch.equal(output, torch.tensor([0.7, 0.7, 1.0, 1.0, 1.0]))
