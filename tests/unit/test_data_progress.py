# SPDX-License-Identifier: Apache-2.0
"""The progress of `adadecode data`: rows, rate and what is left."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from adadecode_vllm.toolkit import progress as progress_module
from adadecode_vllm.toolkit.data import generate as generate_module
from adadecode_vllm.toolkit.data.command import Display
from adadecode_vllm.toolkit.data.generate import Answer, EngineSpec, Shards
from adadecode_vllm.toolkit.data.make import make_data
from adadecode_vllm.toolkit.data.options import DataOptions
from tests.fake_answers import fail_after, fake_answers

pytestmark = pytest.mark.usefixtures("no_engine")


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
