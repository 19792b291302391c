# SPDX-License-Identifier: Apache-2.0
"""Writes the texts that the demo's heads are trained and judged on.

    python write_texts.py WORK

Prompts of problems for the model to answer, source files as they are, and held-out
ones of both kinds, a JSON object with a `text` a line, as `adadecode data` reads them.
"""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import corpus
import typer

# Phrasings are those the model was trained on; names and numbers are drawn anew.
PROBLEMS_SEED = 4


def main(
    directory: Annotated[Path, typer.Argument(help="Where the four files go")],
    problems: Annotated[int, typer.Option(help="Prompts to train on")] = 1500,
    code_files: Annotated[int, typer.Option(help="Source files to train on")] = 40,
    heldout_problems: Annotated[int, typer.Option(help="Held-out prompts")] = 240,
    heldout_code: Annotated[int, typer.Option(help="Held-out prompts")] = 40,
) -> None:
    """Write the files."""
    directory.mkdir(parents=True, exist_ok=True)
    training = itertools.islice(corpus.training_problems(PROBLEMS_SEED), problems)
    sources = corpus.training_code()
    # Spread over the library, which is sorted by name.
    every = max(1, len(sources) // code_files)
    for name, texts in {
        "problems": (problem.prompt for problem in training),
        "code": sources[::every][:code_files],
        "heldout_problems": corpus.heldout_problems(heldout_problems),
        "heldout_code": corpus.heldout_code_prompts(heldout_code),
    }.items():
        _write(directory / f"{name}.jsonl", texts)


def _write(path: Path, texts: Iterable[str]) -> None:
    """Write a file, but not over another text."""
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    if path.exists() and path.read_text(encoding="utf-8") != content:
        raise typer.BadParameter(
            f"{path} holds other text; remove it or give another directory"
        )
    path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
