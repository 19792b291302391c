# SPDX-License-Identifier: Apache-2.0
"""Which answers count as right, and what a model's code may do."""

from __future__ import annotations

import json
import socket
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from adadecode_vllm.errors import AdaDecodeError
from benchmarks.quality import (
    _without_network,
    code_of,
    last_number,
    make_grade,
    passed_humaneval,
)
from benchmarks.workloads import load_workload
from tests.harness import MODEL

# Problems of our own, in HumanEval's form.
PROBLEMS: list[dict[str, Any]] = [
    {
        "task_id": f"Test/{number}",
        "prompt": f'from math import floor\n\n\ndef {name}(a, b):\n    """{text}"""\n',
        "canonical_solution": f"    return {answer}\n",
        "entry_point": name,
        "test": f"def check(candidate):\n    assert candidate(7, 2) == {value}\n",
    }
    for number, (name, text, answer, value) in enumerate(
        [
            ("add", "The sum.", "a + b", 9),
            ("ratio", "The ratio, rounded down.", "floor(a / b)", 3),
        ]
    )
]
WHOLE = "Here it is:\n```python\ndef add(a, b):\n    return a + b\n```\nIt adds."
BODY = "    return floor(a / b)\n"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = 7 eggs.", "7"),
        ("It costs $1,234.50.", "1234.5"),
        ("<<3-8=-5>>-5\n#### -5", "-5"),
        ("#### 18", "18.00"),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number_counts(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (WHOLE, "def add(a, b):\n    return a + b\n"),
        ("```\nprint(1)\n```\n```py\ndef add(a, b):\n    pass\n```", None),
        ("```python\ndef add(a, b):\n    return 1", "def add(a, b):\n    return 1"),
        ("    return a + b", "    return a + b"),
        ("return a + b\n", "    return a + b\n"),
        ("def add(a, b): return 0", "def add(a, b): return 0"),
    ],
)
def test_code_is_found(answer: str, code: str | None) -> None:
    assert code_of(answer, "add") == (code or "def add(a, b):\n    pass\n")


def test_code_runs_behind_its_prompt() -> None:
    """With the prompt's imports, as a whole function or as its body."""
    assert passed_humaneval(PROBLEMS, [WHOLE, BODY]) == [True, True]
    assert passed_humaneval(PROBLEMS, ["    return 1", "    return ("]) == [False] * 2


def test_code_reaches_neither_files_nor_the_network(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("here", encoding="utf-8")
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    removes = f"    import os\n    os.remove({str(kept)!r})\n    return 9\n"
    connects = (
        "    import socket\n"
        f"    socket.create_connection(('127.0.0.1', {port}), 2)\n    return 3\n"
    )
    with listener:
        passed = passed_humaneval(PROBLEMS, [removes, connects])
    assert passed == [False, not _without_network()]
    assert kept.read_text(encoding="utf-8") == "here"


def test_code_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.quality._PROBLEM_SECONDS", 0.5)
    endless = "    while True:\n        pass\n"
    greedy = "    return len(bytearray(8 << 30)) and 3\n"
    assert passed_humaneval(PROBLEMS, [endless, greedy]) == [False, False]


def test_answers_are_graded_in_the_workloads_order(tmp_path: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)

    def grade(
        name: str, rows: list[dict[str, Any]], answers: list[str], first: int = 0
    ) -> list[bool]:
        path = tmp_path / f"{name}_test.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        workload = load_workload(name, MODEL, path=path, count=2, output_tokens=8)
        numbers = range(first, first + len(answers))
        ids = tokenizer(answers)["input_ids"]
        return make_grade(workload, MODEL, path)(ids, numbers)

    rows = [{"question": f"{n}?", "answer": f"It is\n#### {n}"} for n in (1, 2)]
    assert grade("gsm8k", rows, ["I say 1", "I say 1"]) == [True, False]
    assert grade("gsm8k", rows, ["I say 2"], first=1) == [True]
    body = PROBLEMS[1]["canonical_solution"]
    assert grade("humaneval", PROBLEMS, [body, body]) == [False, True]


def test_other_workloads_have_no_right_answer() -> None:
    workload = load_workload("problems", MODEL, count=2)
    with pytest.raises(AdaDecodeError, match=r"^--quality: .*problems.* drop it, or"):
        make_grade(workload, MODEL, None)
