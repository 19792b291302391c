# SPDX-License-Identifier: Apache-2.0
"""From examples to token ids: the model's tokenizer, its template and its limits."""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from adadecode_vllm.errors import AdaDecodeError, first_line
from adadecode_vllm.remote_code import only_trusted_code
from adadecode_vllm.toolkit.data.tasks import Example

logger = logging.getLogger(__name__)

_SAMPLES = 16
_SAMPLE_BYTES = 1 << 16
_BATCH = 1024


@dataclass(frozen=True)
class TargetModel:
    """What text is made for.

    Attributes:
        name: Directory or Hugging Face name, as given.
        identity: Tells one model from another of the same name.
        vocab_size: Rows of its LM head.
        max_length: Tokens that it was made for; None where its configuration is
            silent.
        tokenizer: Its Transformers tokenizer.
    """

    name: str
    identity: str
    vocab_size: int
    max_length: int | None
    tokenizer: Any


@dataclass(frozen=True)
class TokenIds:
    """Token ids that are to be answered, or finished text.

    Attributes:
        source: See `DataRow`.
        ids: Token ids as the model will see them.
    """

    source: str
    ids: list[int]


def load_model(name: str, *, trust_remote_code: bool = False) -> TargetModel:
    """Read a model's configuration and tokenizer, not its weights.

    Args:
        name: A local directory or a Hugging Face name.
        trust_remote_code: Whether program code that comes with it may run.

    Raises:
        AdaDecodeError: One of them cannot be read, it is no language model, or it needs
            code that may not run.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        with only_trusted_code(f"--model {name}"):
            config = AutoConfig.from_pretrained(
                name, trust_remote_code=trust_remote_code
            )
            tokenizer = AutoTokenizer.from_pretrained(
                name, trust_remote_code=trust_remote_code
            )
        text_config = config.get_text_config()
        vocab_size = int(text_config.vocab_size)
    except AdaDecodeError:
        raise
    # Not narrower: neither the errors of a configuration's own checks nor those of the
    # HTTP client derive from anything else.
    except Exception as error:
        raise AdaDecodeError(
            f"--model {name}: its configuration or tokenizer cannot be read "
            f"({first_line(error)}); give a language model in the Hugging Face layout, "
            "or check its name, the connection and your access"
        ) from error
    length = getattr(text_config, "max_position_embeddings", None)
    return TargetModel(
        name,
        _identity(name, getattr(config, "_commit_hash", None)),
        vocab_size,
        length if isinstance(length, int) and length > 0 else None,
        tokenizer,
    )


def use_chat_template(
    model: TargetModel, chat: bool | None, task: str, finished: bool
) -> bool:
    """Decide whether prompts go through the tokenizer's chat template.

    Args:
        model: The model.
        chat: The user's choice; None for: where the tokenizer has a template, but
            never for finished text of one's own.
        task: The task.
        finished: Whether text is taken as it is.

    Raises:
        AdaDecodeError: A template is asked for where there is none, or nothing to
            apply it to.
    """
    own_text = finished and task == "text"
    if chat and own_text:
        raise AdaDecodeError(
            "--chat: with --finished --task text there are no messages to put into a "
            "template; drop --chat"
        )
    has_template = bool(getattr(model.tokenizer, "chat_template", None))
    if chat and not has_template:
        raise AdaDecodeError(
            f"--chat: the tokenizer of {model.name} has no chat template; pass --plain"
        )
    return has_template and not own_text if chat is None else chat


def tokenize(
    examples: Sequence[Example],
    model: TargetModel,
    *,
    chat: bool,
    finished: bool,
    date: datetime,
) -> list[TokenIds]:
    """Turn examples into token ids.

    Args:
        examples: The examples.
        model: The model.
        chat: Whether to apply the chat template.
        finished: Whether the published answers follow the prompts.
        date: What templates that show a date are told, in order that a run that is
            resumed on another day makes the same ids.

    Returns:
        One sequence per example. Plain text gets the tokenizer's special tokens, as
        vLLM's completions do; a template brings its own.

    Raises:
        AdaDecodeError: The template fails, or the tokenizer has ids that the model
            lacks.
    """
    sequences: list[TokenIds] = []
    for start in range(0, len(examples), _BATCH):
        batch = examples[start : start + _BATCH]
        if chat:
            all_ids = [_render(e, model, finished, date) for e in batch]
        else:
            texts = [e.plain + e.reference if finished else e.plain for e in batch]
            # Not verbose: sequences that are too long are counted later.
            all_ids = model.tokenizer(texts, verbose=False)["input_ids"]
        sequences += [
            TokenIds(e.source, list(ids)) for e, ids in zip(batch, all_ids, strict=True)
        ]
    largest = max(max(s.ids, default=0) for s in sequences)
    if largest >= model.vocab_size:
        raise AdaDecodeError(
            f"--model {model.name}: its tokenizer gives the id {largest}, but its LM "
            f"head has only {model.vocab_size} rows; give the model with its own "
            "tokenizer"
        )
    return sequences


def keep_short(
    sequences: Sequence[TokenIds], max_length: int
) -> tuple[list[TokenIds], int]:
    """Leave out prompts that are too long.

    Args:
        sequences: The prompts.
        max_length: Most tokens of a prompt.

    Returns:
        Those that fit, and how many did not.

    Raises:
        AdaDecodeError: None fits.
    """
    kept = [s for s in sequences if 0 < len(s.ids) <= max_length]
    if not kept:
        shortest = min(len(s.ids) for s in sequences)
        raise AdaDecodeError(
            f"--max-length {max_length}: all {len(sequences):,} prompts are longer, "
            f"the shortest has {shortest} tokens; raise it, lower --max-new-tokens, or "
            "give shorter prompts"
        )
    return kept, len(sequences) - len(kept)


def cut(sequences: Iterable[TokenIds], max_length: int) -> tuple[list[TokenIds], int]:
    """Cut finished text into pieces of at most `max_length` tokens; nothing is lost.

    Returns:
        The pieces in order, and how many texts were cut.
    """
    pieces, number = [], 0
    for sequence in sequences:
        ids = sequence.ids
        number += len(ids) > max_length
        pieces += [
            TokenIds(sequence.source, ids[i : i + max_length])
            for i in range(0, len(ids), max_length)
        ]
    return pieces, number


def ids_hash(sequences: Iterable[TokenIds]) -> str:
    """Return the SHA-256 in hex of all sequences with their sources."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(json.dumps([sequence.source, sequence.ids]).encode())
    return digest.hexdigest()


def _render(
    example: Example, model: TargetModel, finished: bool, date: datetime
) -> list[int]:
    """Put one example into the chat template."""
    messages = [{"role": "user", "content": example.message}]
    if finished:
        messages.append({"role": "assistant", "content": example.reply})
    try:
        return model.tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=not finished,
            tokenize=True,
            return_dict=False,
            date_string=date.strftime("%d %b %Y"),
            strftime_now=date.strftime,
        )
    # A template is a program of the model's maker; jinja2's errors are no ValueErrors.
    except Exception as error:
        raise AdaDecodeError(
            f"--chat: the chat template of {model.name} failed ({first_line(error)}); "
            "pass --plain"
        ) from error


def _identity(name: str, commit: str | None) -> str:
    """Tell one model from another: a commit, or a hash of a directory's content.

    Of the weights, which may be large, a few places are read: another training changes
    all of them.
    """
    directory = Path(name)
    if not directory.is_dir():
        return f"{name}@{commit}"
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix not in (".json", ".jinja", ".safetensors") or not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}\n".encode())
        with path.open("rb") as file:
            if path.suffix != ".safetensors":
                digest.update(file.read())
                continue
            for i in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return f"sha256:{digest.hexdigest()}"
