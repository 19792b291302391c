# SPDX-License-Identifier: Apache-2.0
"""The tasks: what their files hold, which rows are used, how a model is asked.

Numbers of rows are those of the AdaDecode paper: XSum 10,000 for training and 1,000 for
tests, all 974 of MBPP for training, the 164 of HumanEval for tests, all 7,473 of GSM8K
for training and 1,000 for tests.
"""

import hashlib
import heapq
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.toolkit.data.readers import (
    DATA_SUFFIXES,
    TEXT_SUFFIX,
    WHOLE_TEXT,
    Record,
    list_files,
    read_records,
)

logger = logging.getLogger(__name__)

#: First words of file and directory names that tell a published split.
_SPLIT_NAMES = {
    "train": "train",
    "test": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "prompt": "prompt",
}


@dataclass(frozen=True)
class Example:
    """A question for the model, with the published answer.

    Attributes:
        source: Task and split, or the file's name.
        plain: The prompt for a model without chat template.
        message: The user's message for a model with one.
        reference: The published answer, as it continues `plain`; empty where there
            is none.
        reply: The published answer as an assistant's message.
    """

    source: str
    plain: str
    message: str
    reference: str = ""
    reply: str = ""


@dataclass(frozen=True)
class Task:
    """A published data set.

    Attributes:
        columns: The fields that `example` reads.
        counts: By split that may be asked for, the paper's number of rows; None where
            all are used.
        example: Makes an example of a record and the source's name; its texts are
            empty where the record is.
        files_by_split: Whether files hold one split each and are chosen by name.
        passed_over: Words in names of files that hold another variant of the data.
        in_split: Whether a record belongs to a split, where that is told by record.
    """

    columns: tuple[str, ...]
    counts: Mapping[str, int | None]
    example: Callable[[Record, str], Example]
    files_by_split: bool = True
    passed_over: tuple[str, ...] = ()
    in_split: Callable[[Record, str], bool] = field(default=lambda record, split: True)


@dataclass(frozen=True)
class Selection:
    """Which examples to take.

    Attributes:
        task: `text` or a key of `TASKS`.
        split: A key of the task's `counts`; None for `text`.
        count: Number of rows; None for the paper's, or all of `text`.
        seed: Decides which rows, where not all.
        text_field: The field of `text`'s records that holds the text.
    """

    task: str
    split: str | None = None
    count: int | None = None
    seed: int = 0
    text_field: str = "text"


def _xsum(record: Record, source: str) -> Example:
    document = record.text("document").strip()
    summary = record.text("summary").strip()
    if not document:
        return Example(source, "", "")
    return Example(
        source,
        plain=f"Article:\n{document}\n\nThe article in one sentence:",
        message=f"Summarize this article in one sentence.\n\n{document}",
        reference=f" {summary}",
        reply=summary,
    )


def _mbpp(record: Record, source: str) -> Example:
    text = record.text("text").strip()
    code = record.text("code").replace("\r\n", "\n").strip()
    tests = "\n".join(record.texts("test_list"))
    return Example(
        source,
        plain=f'"""\n{text}\n\n{tests}\n"""\n',
        message=f"{text}\n\nThe Python code must pass these tests:\n\n"
        f"```python\n{tests}\n```",
        reference=f"{code}\n",
        reply=f"```python\n{code}\n```",
    )


def _mbpp_in_split(record: Record, split: str) -> bool:
    # Training takes all, as the paper does: its test set is HumanEval.
    return split == "train" or 11 <= record.integer("task_id") <= 510


def _humaneval(record: Record, source: str) -> Example:
    prompt = record.text("prompt")
    solution = record.text("canonical_solution")
    return Example(
        source,
        plain=prompt,
        message="Complete this Python function and give it as a whole.\n\n"
        f"```python\n{prompt.strip()}\n```",
        reference=solution,
        reply=f"```python\n{prompt}{solution.rstrip()}\n```",
    )


def _gsm8k(record: Record, source: str) -> Example:
    question = record.text("question").strip()
    answer = record.text("answer").strip()
    return Example(
        source,
        plain=f"Question: {question}\nAnswer:",
        message=f"{question}\n\nReason step by step, then give the answer.",
        reference=f" {answer}",
        reply=answer,
    )


TASKS: Mapping[str, Task] = {
    "xsum": Task(
        columns=("document", "summary"),
        counts={"train": 10_000, "test": 1_000},
        example=_xsum,
    ),
    "mbpp": Task(
        columns=("task_id", "text", "code", "test_list"),
        counts={"train": None, "test": None},
        example=_mbpp,
        files_by_split=False,
        passed_over=("sanitized",),  # other fields, and the same tasks again
        in_split=_mbpp_in_split,
    ),
    "humaneval": Task(
        columns=("prompt", "canonical_solution"),
        counts={"test": None},
        example=_humaneval,
        files_by_split=False,
    ),
    "gsm8k": Task(
        columns=("question", "answer"),
        counts={"train": None, "test": 1_000},
        example=_gsm8k,
        # The same questions answered in another style, and answers of other models.
        passed_over=("socratic", "model_solutions"),
    ),
}
TASK_NAMES = (*TASKS, "text")


def check_selection(selection: Selection) -> Selection:
    """Complete a selection and refuse what the task does not have.

    Args:
        selection: What was asked for.

    Returns:
        The same with the split filled in: the first one that the task has.

    Raises:
        AdaDecodeError: Unknown task or split, or options that do not belong together.
    """
    name, split = selection.task, selection.split
    if name not in TASK_NAMES:
        raise AdaDecodeError(
            f"--task {name}: unknown task; choose one of {', '.join(TASK_NAMES)}"
        )
    if name == "text":
        if split is not None:
            raise AdaDecodeError(
                f"--split {split}: files of --task text have no splits; give the files "
                "of the split to --input"
            )
        return selection
    splits = TASKS[name].counts
    if split is not None and split not in splits:
        advice = (
            "use --task mbpp for training"
            if name == "humaneval"
            else f"choose one of {', '.join(splits)}"
        )
        raise AdaDecodeError(
            f"--split {split}: {name} has only {' and '.join(splits)}; {advice}"
        )
    if (name, split) == ("mbpp", "test"):
        logger.warning(
            "mbpp test is part of mbpp train, which is all of it, as in the paper: "
            "heads that were trained on the one cannot be judged on the other"
        )
    return Selection(name, split or next(iter(splits)), selection.count, selection.seed)


def input_files(selection: Selection, inputs: Sequence[Path]) -> list[Path]:
    """Find the files of a selection.

    Args:
        selection: What `check_selection` returned.
        inputs: Files, and directories to search.

    Returns:
        The files in a fixed order.

    Raises:
        AdaDecodeError: There are none, one has an unknown extension or is named for
            another split.
    """
    if not inputs:
        raise AdaDecodeError(
            "--input: no file or directory is given; name at least one"
        )
    if selection.task == "text":
        return [p for p, _ in list_files(inputs, (*DATA_SUFFIXES, TEXT_SUFFIX))]
    task, split = TASKS[selection.task], selection.split
    files = []
    for path, named in list_files(inputs, DATA_SUFFIXES):
        # A file that is named is meant; in a directory names tell which files are.
        names = [path.name] if named else [path.name, path.parent.name]
        if not named and any(w in n.lower() for w in task.passed_over for n in names):
            continue
        if task.files_by_split and (found := _split_of(names)) != split:
            if not named:
                continue
            if found is not None:
                raise AdaDecodeError(
                    f"--input {path}: by its name this is the {found} split and "
                    f"--split is {split}; give the file of that split, or rename it"
                )
        files.append(path)
    if not files:
        raise AdaDecodeError(
            f"--input {inputs[0]}: no file there is named for the {split} split of "
            f"{selection.task}; name the file itself, or correct --split"
        )
    return files


def select_examples(
    selection: Selection, files: Sequence[Path]
) -> tuple[list[Example], int]:
    """Read the examples of a selection.

    Where fewer than all are wanted, those are taken whose place has the smallest
    SHA-256 together with the seed: the same on every machine and Python.

    Args:
        selection: What `check_selection` returned.
        files: What `input_files` returned.

    Returns:
        The examples in the order of the files, and how many records were passed over
        because their text is blank.

    Raises:
        AdaDecodeError: A file cannot be read, or there are fewer than `count`.
    """
    blank = 0

    def stream() -> Iterator[tuple[str, int, Example]]:
        nonlocal blank
        number = 0
        for example in _read_examples(selection, files):
            if not example.plain.strip():
                blank += 1
                continue
            key = hashlib.sha256(f"{selection.seed}:{number}".encode()).hexdigest()
            yield key, number, example
            number += 1

    count = selection.count
    wanted = count
    if wanted is None and selection.task != "text":
        wanted = TASKS[selection.task].counts[selection.split or ""]
    if wanted is None:
        examples = [example for _, _, example in stream()]
    else:
        picked = heapq.nsmallest(wanted, stream(), key=lambda item: item[:2])
        examples = [e for _, _, e in sorted(picked, key=lambda item: item[1])]
    if not examples:
        raise AdaDecodeError(
            f"--input {files[0]}: no record has any text; give other files"
        )
    if wanted is not None and len(examples) < wanted:
        if count is not None:
            raise AdaDecodeError(
                f"--count {count}: the files hold only {len(examples):,} usable "
                "records; ask for fewer, or give more files"
            )
        logger.warning(
            "The files hold %s records of %s %s; the paper used %s",
            f"{len(examples):,}",
            selection.task,
            selection.split,
            f"{wanted:,}",
        )
    return examples, blank


def _read_examples(selection: Selection, files: Sequence[Path]) -> Iterator[Example]:
    """All examples of the split, blank ones included."""
    if selection.task == "text":
        for path in files:
            for record in read_records(path, [selection.text_field]):
                name = (
                    WHOLE_TEXT if WHOLE_TEXT in record.values else selection.text_field
                )
                text = record.text(name)
                yield Example(path.name, plain=text, message=text)
        return
    task, split = TASKS[selection.task], selection.split or ""
    for path in files:
        for record in read_records(path, task.columns):
            if task.in_split(record, split):
                yield task.example(record, f"{selection.task}/{split}")


def _split_of(names: Sequence[str]) -> str | None:
    """The split that the first of these names with a split's name begins with."""
    for name in names:
        word = name.lower().replace("_", "-").replace(".", "-").partition("-")[0]
        if word in _SPLIT_NAMES:
            return _SPLIT_NAMES[word]
    return None
