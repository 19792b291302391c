# SPDX-License-Identifier: Apache-2.0
"""Training and evaluation text of the demo model.

Two sources, both local: worked arithmetic word problems from the templates in
``templates.py``, and the source code of the running interpreter's own standard
library.  Evaluation never uses training material: its problems come from held-out
phrasings, its code from held-out files.
"""

import logging
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from templates import KINDS, NAMES, OBJECTS, Kind

logger = logging.getLogger(__name__)

#: What stands between a problem and its worked answer; prompts end with it.
PROMPT_TEMPLATE = "Problem: {problem}\nSteps:\n"

#: Seeds are named so that no two streams of problems coincide by accident.
TRAIN_SEED = 1
HELD_OUT_SEED = 2_000_003

#: Standard-library files that are never trained on.
HELD_OUT_FILES = (
    "argparse.py",
    "bisect.py",
    "calendar.py",
    "configparser.py",
    "csv.py",
    "fractions.py",
    "json/decoder.py",
    "queue.py",
    "shutil.py",
    "textwrap.py",
)

#: Tests, other people's code, and files that are tables rather than programs.
_SKIPPED = """
ensurepip encodings idlelib lib-dynload lib2to3 pydoc_data site-packages test tests
turtledemo
"""
_SKIPPED_FOLDERS = frozenset(_SKIPPED.split())


@dataclass(frozen=True)
class Problem:
    """A word problem with its worked answer.

    Attributes:
        kind: Name of the kind it was made from.
        prompt: Text up to the point where the worked answer starts.
        solution: The worked answer, ending with ``Answer: ...`` and no newline.
        answer: The number on the last line.
    """

    kind: str
    prompt: str
    solution: str
    answer: int


def _make_problem(rng: Random, kind: Kind, phrasings: tuple[str, ...]) -> Problem:
    numbers = kind.draw(rng)
    first, second = rng.sample(NAMES, 2)
    values = {**numbers, "n": first, "m": second, "o": rng.choice(OBJECTS)}
    problem = rng.choice(phrasings).format(**values)
    lines = [
        f"{index}. {step.format(**values)}"
        for index, step in enumerate(kind.steps, start=1)
    ]
    answer = numbers[kind.answer]
    lines.append(f"Answer: {answer}{kind.unit.format(**values)}")
    return Problem(
        kind=kind.name,
        prompt=PROMPT_TEMPLATE.format(problem=problem),
        solution="\n".join(lines),
        answer=answer,
    )


def training_problems(seed: int = TRAIN_SEED) -> Iterator[Problem]:
    """Yields problems from the training phrasings, without end.

    Every phrasing is equally likely, so that kinds with more phrasings do not get
    fewer examples for each.
    """
    rng = Random(seed)
    choices = [(kind, (text,)) for kind in KINDS for text in kind.train]
    while True:
        yield _make_problem(rng, *rng.choice(choices))


def heldout_problems_with_solutions(n: int, seed: int = HELD_OUT_SEED) -> list[Problem]:
    """Makes ``n`` problems from held-out phrasings, the kinds taking turns."""
    rng = Random(seed)
    kinds = [KINDS[index % len(KINDS)] for index in range(n)]
    rng.shuffle(kinds)
    return [_make_problem(rng, kind, kind.held_out) for kind in kinds]


def heldout_problems(n: int, seed: int = HELD_OUT_SEED) -> list[str]:
    """Prompts of ``n`` held-out problems, ending where the answer starts."""
    return [problem.prompt for problem in heldout_problems_with_solutions(n, seed)]


def parse_answer(text: str) -> int | None:
    """Reads the number after ``Answer:``, or None where there is none."""
    _, found, tail = text.partition("Answer: ")
    digits = tail.split(maxsplit=1)[0] if found and tail.strip() else ""
    return int(digits) if digits.isdecimal() else None


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        logger.warning("left out %s: %s", path.name, error)
        return None


def training_code() -> list[str]:
    """Texts of all standard-library files used for training, in a fixed order."""
    root = _stdlib()
    held_out = {root / name for name in HELD_OUT_FILES}
    texts = []
    for path in sorted(root.rglob("*.py")):
        parents = path.relative_to(root).parts[:-1]
        if path in held_out or _SKIPPED_FOLDERS.intersection(parents):
            continue
        text = _read(path)
        if text:
            texts.append(text)
    return texts


def heldout_code_prompts(
    n: int, seed: int = HELD_OUT_SEED, min_chars: int = 160, max_chars: int = 300
) -> list[str]:
    """Cuts ``n`` prompts from held-out files, starting and ending at a line start.

    Args:
        n: Number of prompts; the files take turns.
        seed: Seed of the places where the prompts are cut.
        min_chars: Shortest prompt, about 60 tokens of the demo's tokenizer.
        max_chars: Longest prompt, about 150 tokens.

    Returns:
        The prompts, in the order in which they were cut.
    """
    rng = Random(seed)
    root = _stdlib()
    files = []
    for name in HELD_OUT_FILES:
        text = _read(root / name)
        if text is None:
            raise FileNotFoundError(f"{name} is missing from this interpreter")
        files.append(text.splitlines(keepends=True))
    prompts: list[str] = []
    while len(prompts) < n:
        lines = files[len(prompts) % len(files)]
        first = rng.randrange(len(lines) // 2)
        wanted = rng.randint(min_chars, max_chars)
        prompt = ""
        for line in lines[first:]:
            if len(prompt) + len(line) > max_chars:
                break
            prompt += line
            if len(prompt) >= wanted:
                break
        if len(prompt) >= min_chars:
            prompts.append(prompt)
    return prompts
