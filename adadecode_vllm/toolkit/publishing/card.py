# SPDX-License-Identifier: Apache-2.0
"""The model card, `README.md` of a heads directory."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Final

from adadecode_vllm.files import atomic_write, free_name
from adadecode_vllm.heads.config import ExitHeadsConfig
from adadecode_vllm.heads.files import CARD_FILE
from adadecode_vllm.heads.hub import LIBRARY, is_hub_id
from adadecode_vllm.toolkit.publishing.card_reading import Told, told_training
from adadecode_vllm.toolkit.publishing.signed import change_signed, is_as_written, sign
from adadecode_vllm.toolkit.report.defaults import defaults_in_words
from adadecode_vllm.toolkit.report.schema import (
    Evaluation,
    ExitFigures,
    ThresholdRow,
    parse_evaluation,
)
from adadecode_vllm.toolkit.report.text import (
    among,
    conditions,
    count,
    decimal,
    percent,
    ratio,
    short,
)

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

logger = logging.getLogger(__name__)

# Of a training's record, what other parts of the card or `config.json` say.
_ELSEWHERE: Final = (
    "argv",
    "license",
    "model",
    "model_fingerprint",
    "exit_layers",
    "calibration",
)

_TEMPLATE: Final = Path(__file__).with_name("card.md.j2")
_TAGS: Final = ["adadecode", "vllm", "speculative-decoding", "early-exit"]
# An absolute path inside any text, but not the end of a URL or of a relative path.
_ABSOLUTE_PATH = re.compile(r"(?<![\w.:/~-])/(?:[^\s/]+/)+([^\s/]*)")
_VOCABULARY_ROW = re.compile(r"^\| Vocabulary \|.*$", re.MULTILINE)
_DRAFT_VOCABULARY_ROW = re.compile(r"^\| Draft vocabulary \|.*\n", re.MULTILINE)
# A word as `shlex.quote` writes it, apostrophes included.
_HEADS_ARGUMENT = re.compile(r"""(--adadecode-heads )((?:'[^']*'|"'")+|\S+)""")


def write_card(
    directory: str | PathLike[str],
    config: ExitHeadsConfig,
    *,
    training: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    repo_id: str | None = None,
) -> Path:
    """Write `README.md` into a heads directory; see `replace_card`.

    Args:
        directory: The heads directory; it exists.
        config: Its configuration.
        training: What made the heads, such as `run.yaml`, nested as deep as it likes:
            `license` and `datasets` go into the card's metadata, `argv` is shown as a
            command, `held_out` (loss and agreement by exit) and the rest as tables.
            None if it is not known; what a card that was written here says of it
            stays.
        evaluation: `evaluation.json`, decoded. None for a card without figures.
        repo_id: The repository on the Hub to name in the serve command; None for the
            directory.

    Returns:
        The file.

    Raises:
        AdaDecodeError: The evaluation is incomplete.
        OSError: The file cannot be written.
    """
    heads = repo_id or str(directory)
    told = None if training is not None else told_training(Path(directory) / CARD_FILE)
    text = render_card(
        config, heads, training=training, evaluation=evaluation, told=told
    )
    return replace_card(directory, text)


def replace_card(directory: str | PathLike[str], card: str) -> Path:
    """Write `README.md` into a directory; what somebody else wrote there is kept.

    Args:
        directory: The heads directory; it exists. A `README.md` that is not, to the
            letter, a card of `render_card` is renamed to `README.md.old`, or
            `README.md.old2` and so on.
        card: The card's text.

    Returns:
        The file.

    Raises:
        OSError: The file cannot be written.
    """
    path = Path(directory) / CARD_FILE
    if os.path.lexists(path) and not is_as_written(path):
        old = free_name(path.with_name(f"{CARD_FILE}.old"))
        logger.warning("%s is not a card as it was written here; kept as %s", path, old)
        path.rename(old)
    return atomic_write(path, card.encode())


def render_card(
    config: ExitHeadsConfig,
    heads: str | None,
    *,
    training: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    told: Told | None = None,
) -> str:
    """Render a model card.

    Args:
        config: The heads' configuration.
        heads: What to serve, or to give to `--adadecode-heads`: a directory or a
            repository. None for heads that are registered for their model, which brings
            them with it.
        training: See `write_card`.
        evaluation: See `write_card`.
        told: What is said of the training in place of a record of it.

    Returns:
        Markdown with YAML metadata. Absolute paths in the training are cut to their
        last part, because a card is made to be published. A comment at the end tells
        later whether anybody has changed the text since.

    Raises:
        AdaDecodeError: The evaluation is incomplete.
    """
    from huggingface_hub import ModelCard

    training = training or {}
    figures = None if evaluation is None else parse_evaluation(evaluation)
    held_out = _held_out(training.get("held_out"))
    elsewhere = (*_ELSEWHERE, "held_out") if held_out else _ELSEWHERE
    listed = {key: value for key, value in training.items() if key not in elsewhere}
    *others, last = (str(layer) for layer in config.exit_layers)
    recommended = config.recommended if heads is not None else None
    card = ModelCard.from_template(
        _metadata(config, training if told is None else told.metadata),
        template_path=str(_TEMPLATE),
        config=config,
        heads=heads,
        recommended=recommended and json.dumps(recommended),
        exits=f"{', '.join(others)} or {last}" if others else last,
        draft_vocabulary=_draft_vocabulary(config),
        training=training,
        told=told and told.section,
        command=_command(training.get("argv")),
        held_out=held_out,
        among=among(_compared_tokens(training)),
        settings=list(_flatten(listed)),
        **_figures(figures),
        **_FORMATS,
    )
    return sign(f"{card.content}\n")


def name_repository(card: str, repo_id: str) -> str:
    """Let a card's serve commands load the heads from a repository.

    Args:
        card: The card's text.
        repo_id: The repository that the card is about to be published in.

    Returns:
        The card's text, changed only behind `--adadecode-heads`, and where the same
        heads are served by their own name.
    """
    repository = shlex.quote(repo_id)

    def named(text: str) -> str:
        for _, heads in set(_HEADS_ARGUMENT.findall(text)):
            text = text.replace(f"vllm serve {heads} ", f"vllm serve {repository} ")
        return _HEADS_ARGUMENT.sub(lambda match: match[1] + repository, text)

    return change_signed(card, named)


def name_draft_vocabulary(card: str, config: ExitHeadsConfig) -> str:
    """Let a card tell the draft vocabulary of heads that were given another one.

    Args:
        card: The card's text.
        config: The heads' configuration, as it is now.

    Returns:
        The card's text with its table's row for the draft vocabulary added, changed or
        removed. A card without that table is returned as it is.
    """
    row = _draft_vocabulary(config)
    return change_signed(
        card,
        lambda text: _VOCABULARY_ROW.sub(
            lambda match: f"{match[0]}\n{row}" if row else match[0],
            _DRAFT_VOCABULARY_ROW.sub("", text),
            count=1,
        ),
    )


def _metadata(config: ExitHeadsConfig, training: Mapping[str, Any]) -> ModelCardData:
    """The YAML block; the Hub refuses names there that are not its own."""
    from huggingface_hub import ModelCardData

    published = is_hub_id(config.base_model)
    datasets = training.get("datasets") or []
    if isinstance(datasets, str):
        datasets = [datasets]
    known = [name for name in datasets if isinstance(name, str) and is_hub_id(name)]
    license_name = training.get("license")
    return ModelCardData(
        base_model=config.base_model if published else None,
        # The base model is used as it is; without this the Hub shows a fine-tune.
        base_model_relation="adapter" if published else None,
        library_name=LIBRARY,
        license=license_name if isinstance(license_name, str) else None,
        datasets=known or None,
        tags=_TAGS,
    )


def _draft_vocabulary(config: ExitHeadsConfig) -> str | None:
    """The table's row for the draft vocabulary, where there is one."""
    if config.draft_vocabulary is None:
        return None
    tokens = f"the {count(config.draft_vocabulary)} most frequent tokens"
    return f"| Draft vocabulary | {tokens} of the training text |"


def _command(argv: Any) -> str | None:
    """The training's command, on one line and without the machine's paths."""
    if not isinstance(argv, Sequence) or isinstance(argv, str) or not argv:
        return None
    words = [PurePath(str(argv[0])).name, *(_public(str(word)) for word in argv[1:])]
    return _one_line(shlex.join(words))


def _held_out(record: Any) -> list[tuple[str, float, list[float | None]]]:
    """Exit, loss and agreement of the epoch that was kept, as training records them.

    Agreement is by draft of a cycle where the heads have memory.
    """
    if not isinstance(record, Mapping) or not isinstance(record.get("loss"), Mapping):
        return []
    first = record.get("agreement") or {}
    by_draft = record.get("agreement_by_draft") or {}
    return [
        (layer, loss, by_draft.get(layer) or [first.get(layer)])
        for layer, loss in record["loss"].items()
    ]


def _compared_tokens(training: Mapping[str, Any]) -> int | None:
    """Tokens that held-out agreement was compared among; None for all."""
    record = training.get("held_out")
    return record.get("draft_vocabulary") if isinstance(record, Mapping) else None


def _shares(values: Sequence[float | None]) -> str:
    """Shares by draft of a cycle, in one cell."""
    return " / ".join(map(percent, values))


def _figures(figures: Evaluation | None) -> dict[str, Any]:
    """What the card says of an evaluation."""
    if figures is None:
        return dict.fromkeys(("figures", "best", "options", "preferred", "by_default"))
    best, options, defaults = figures.best, None, figures.defaults
    preferred = defaults if figures.defaults_are_best else None
    if best and best.speedup > 1 and preferred is None:
        values: dict[str, Any] = {
            "threshold": best.threshold,
            "max_early_predictions": best.cap,
        }
        if figures.simulation and figures.simulation.gate != "probability":
            values["gate"] = figures.simulation.gate
        options = json.dumps(values)
    threshold = best.threshold if best else 0.75
    return {
        "figures": figures,
        "best": best,
        "options": options,
        "preferred": preferred,
        "by_default": defaults_in_words(defaults),
        "data": _public_list(figures.data.split(", ")),
        "gates": [(found, _nearest(found, threshold)) for found in figures.exits],
    }


def _nearest(figures: ExitFigures, threshold: float) -> ThresholdRow | None:
    """The row nearest to a threshold, where there is any."""
    return min(
        figures.thresholds,
        key=lambda row: abs(row.threshold - threshold),
        default=None,
    )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the leaves of a nested mapping with dotted names; None is no value.

    Absolute paths are cut.
    """
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{name}.")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield name, _public_list(value)
        elif value is not None:
            yield name, _public(str(value))


def _public(text: str) -> str:
    """Cut absolute paths to their last part: they tell of a machine, not of heads."""
    if text.startswith("/"):  # with spaces, perhaps
        return PurePath(text).name
    return _ABSOLUTE_PATH.sub(r"\1", text)


def _public_list(items: Sequence[Any]) -> str:
    """The same of each item of a list."""
    return ", ".join(_public(str(item)) for item in items)


def _text(text: str) -> str:
    """Text that stays text in Markdown: one line, no tags, no end of a cell."""
    escaped = _one_line(text).replace("&", "&amp;").replace("<", "&lt;")
    return escaped.replace("|", "\\|")


def _one_line(text: str) -> str:
    """Join lines, so that nothing can end a block."""
    return " ".join(text.split())


_FORMATS: Final[Mapping[str, Any]] = {
    "conditions": conditions,
    "count": count,
    "decimal": decimal,
    "percent": percent,
    "shares": _shares,
    "quote": shlex.quote,
    "ratio": ratio,
    "short": short,
    "text": _text,
}
