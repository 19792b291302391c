# SPDX-License-Identifier: Apache-2.0
"""The model card, `README.md` of a heads directory."""

import json
import logging
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path, PurePath
from typing import Any, Final

from adadecode_vllm.files import free_name, write_whole
from adadecode_vllm.heads.config import ExitHeadsConfig
from adadecode_vllm.heads.files import CARD_FILE
from adadecode_vllm.heads.hub import is_hub_id
from adadecode_vllm.toolkit.publishing.signed import change_signed, is_as_written, sign
from adadecode_vllm.toolkit.report.schema import (
    Evaluation,
    ExitFigures,
    parse_evaluation,
)
from adadecode_vllm.toolkit.report.text import count, decimal, percent, ratio, short

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

_BY_DRAFT: Final = ", for the first, second and third draft of a cycle"
_LIBRARY: Final = "adadecode-vllm"
_TAGS: Final = ["adadecode", "vllm", "speculative-decoding", "early-exit"]
_PAPER: Final = "https://arxiv.org/abs/2506.03700"
# An absolute path inside any text, but not the end of a URL or of a relative path.
_ABSOLUTE_PATH = re.compile(r"(?<![\w.:/~-])/(?:[^\s/]+/)+([^\s/]*)")
_VOCABULARY_ROW = re.compile(r"^\| Vocabulary \|.*$", re.MULTILINE)
_DRAFT_VOCABULARY_ROW = re.compile(r"^\| Draft vocabulary \|.*\n", re.MULTILINE)
_HEADS_ARGUMENT = re.compile(r"(--adadecode-heads )(?:'[^']*'|\S+)")


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
            None if it is not known.
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
    text = render_card(config, heads, training=training, evaluation=evaluation)
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
    return write_whole(path, card.encode())


def render_card(
    config: ExitHeadsConfig,
    heads: str,
    *,
    training: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
) -> str:
    """Render a model card.

    Args:
        config: The heads' configuration.
        heads: What to give to `--adadecode-heads`: a directory or a repository.
        training: See `write_card`.
        evaluation: See `write_card`.

    Returns:
        Markdown with YAML metadata. Absolute paths in the training are cut to their
        last part, because a card is made to be published. A comment at the end tells
        later whether anybody has changed the text since.

    Raises:
        AdaDecodeError: The evaluation is incomplete.
    """
    figures = None if evaluation is None else parse_evaluation(evaluation)
    parts = [
        f"---\n{_metadata(config, training or {})}\n---",
        f"# Exit heads for {_text(config.base_model)}",
        _introduction(config),
        _use(config, heads, figures),
        _heads(config),
        _training(training),
    ]
    if figures:
        parts.append(_figures(figures))
    return sign("\n\n".join(parts) + "\n")


def name_repository(card: str, repo_id: str) -> str:
    """Let a card's serve command load the heads from a repository.

    Args:
        card: The card's text.
        repo_id: The repository that the card is about to be published in.

    Returns:
        The card's text, changed only behind `--adadecode-heads`.
    """
    return change_signed(
        card,
        lambda text: _HEADS_ARGUMENT.sub(
            lambda match: match[1] + shlex.quote(repo_id), text
        ),
    )


def name_draft_vocabulary(card: str, config: ExitHeadsConfig) -> str:
    """Let a card tell the draft vocabulary of heads that were given another one.

    Args:
        card: The card's text.
        config: The heads' configuration, as it is now.

    Returns:
        The card's text with its table's row for the draft vocabulary added, changed or
        removed. A card without that table is returned as it is.
    """
    rows = [_table_row(row) for row in _draft_vocabulary(config)]
    return change_signed(
        card,
        lambda text: _VOCABULARY_ROW.sub(
            lambda match: "\n".join([match[0], *rows]),
            _DRAFT_VOCABULARY_ROW.sub("", text),
            count=1,
        ),
    )


def _metadata(config: ExitHeadsConfig, training: Mapping[str, Any]) -> str:
    """The YAML block; the Hub refuses names there that are not its own."""
    from huggingface_hub import ModelCardData

    published = is_hub_id(config.base_model)
    datasets = training.get("datasets") or []
    if isinstance(datasets, str):
        datasets = [datasets]
    known = [name for name in datasets if isinstance(name, str) and is_hub_id(name)]
    license_name = training.get("license")
    data = ModelCardData(
        base_model=config.base_model if published else None,
        # The base model is used as it is; without this the Hub shows a fine-tune.
        base_model_relation="adapter" if published else None,
        library_name=_LIBRARY,
        license=license_name if isinstance(license_name, str) else None,
        datasets=known or None,
        tags=_TAGS,
    )
    return data.to_yaml()


def _introduction(config: ExitHeadsConfig) -> str:
    """What these files are."""
    *others, last = (str(layer) for layer in config.exit_layers)
    exits = f"{', '.join(others)} or {last}" if others else last
    return (
        f"[AdaDecode]({_PAPER}) heads that predict the next token of "
        f"{_text(config.base_model)} after {exits} of its {config.num_hidden_layers} "
        "layers. vLLM starts the next token at once where a head is sure, runs the "
        "layers that were left out for several tokens together, and verifies: greedy "
        "text is that of the model alone. The model itself is needed and not changed."
    )


def _use(config: ExitHeadsConfig, heads: str, figures: Evaluation | None) -> str:
    """The serve command, with the best setting if it is known to be faster."""
    command = [
        f"vllm serve {shlex.quote(config.base_model)} --plugin adadecode",
        f"    --adadecode-heads {shlex.quote(heads)}",
    ]
    remark = ""
    best = figures.best if figures else None
    if figures and best:
        if best.speedup > 1:
            options: dict[str, Any] = {
                "threshold": best.threshold,
                "max_early_predictions": best.cap,
            }
            if figures.simulation and figures.simulation.gate != "probability":
                options["gate"] = figures.simulation.gate
            quoted = shlex.quote(json.dumps(options))
            command.append(f"    --adadecode-config {quoted}")
            remark = f"\n\nPredicted speedup with this setting: {ratio(best.speedup)}."
        else:
            remark = (
                "\n\nNo setting is predicted to be faster than ordinary decoding; the "
                f"best reaches {ratio(best.speedup)}."
            )
    lines = " \\\n".join(command)
    return (
        f"## Use\n\nWith {_LIBRARY} installed beside vLLM:\n\n"
        f"```sh\n{lines}\n```{remark}"
    )


def _heads(config: ExitHeadsConfig) -> str:
    """What the directory holds."""
    parameters = len(config.exit_layers) * config.hidden_size**2
    if config.memory:
        parameters *= 2
    rows = [
        ["Base model", config.base_model],
        [
            "Exits after layers",
            f"{', '.join(map(str, config.exit_layers))} of {config.num_hidden_layers}",
        ],
        ["Hidden size", count(config.hidden_size)],
        ["Vocabulary", count(config.vocab_size)],
        *_draft_vocabulary(config),
        *([["Memory", "of the token before"]] if config.memory else []),
        ["Parameters", f"{count(parameters)} in {config.dtype}"],
        ["LM head fingerprint", f"`{config.lm_head_fingerprint}`"],
        ["Written by", f"{_LIBRARY} {config.library_version}"],
    ]
    return "## Heads\n\n" + _table(["", ""], rows)


def _draft_vocabulary(config: ExitHeadsConfig) -> list[list[str]]:
    """The table's row for the draft vocabulary, where there is one."""
    if config.draft_vocabulary is None:
        return []
    tokens = f"the {count(config.draft_vocabulary)} most frequent tokens"
    return [["Draft vocabulary", f"{tokens} of the training text"]]


def _training(training: Mapping[str, Any] | None) -> str:
    """How the heads were made."""
    heading = "## Training\n\n"
    if not training:
        return f"{heading}How these heads were made was not recorded."
    parts = []
    argv = training.get("argv")
    if isinstance(argv, Sequence) and not isinstance(argv, str) and argv:
        words = [PurePath(str(argv[0])).name, *(_public(str(a)) for a in argv[1:])]
        parts.append(f"```sh\n{_one_line(shlex.join(words))}\n```")
    shown = {key: value for key, value in training.items() if key not in _ELSEWHERE}
    held_out = shown.get("held_out")
    if isinstance(held_out, Mapping) and isinstance(held_out.get("loss"), Mapping):
        del shown["held_out"]
    else:
        held_out = None
    if rows := [[name, _public(value)] for name, value in _flatten(shown)]:
        parts.append(_table(["Setting", "Value"], rows))
    if held_out:
        parts.append(_held_out(held_out))
    return heading + "\n\n".join(parts)


def _held_out(record: Mapping[str, Any]) -> str:
    """The held-out figures of the epoch that was kept, as training records them."""
    first = record.get("agreement") or {}
    by_draft = record.get("agreement_by_draft") or {}
    rows = [
        [str(layer), decimal(loss), _shares(by_draft.get(layer) or [first.get(layer)])]
        for layer, loss in record["loss"].items()
    ]
    table = _table(["Exit", "Loss, nats per token", "Agreement"], rows)
    return f"On text held out of the training:\n\n{table}"


def _figures(figures: Evaluation) -> str:
    """Agreement and the gate of each exit, and what speed to expect."""
    parts = [
        "## Figures",
        f"On {count(figures.tokens)} held-out tokens ({_text(_public(figures.data))}); "
        "agreement is the share at which the exit's top token is the final layer's"
        f"{_BY_DRAFT if figures.exits[0].agreement_by_draft else ''}.",
    ]
    threshold = figures.best.threshold if figures.best else 0.75
    rows = []
    for e in figures.exits:
        gate = _nearest(e, threshold)
        agreement = _shares(e.agreement_by_draft or [e.agreement])
        rows.append([str(e.layer), agreement, decimal(e.kl), *gate])
    parts.append(
        _table(
            ["Exit", "Agreement", "KL, nats", "Threshold", "Coverage", "Precision"],
            rows,
        )
    )
    if figures.best:
        sentence = (
            "Predicted, not measured: "
            f"{ratio(figures.best.speedup)} over ordinary decoding with threshold "
            f"{short(figures.best.threshold)} and at most {figures.best.cap} early "
            "predictions"
        )
        if cost := figures.cost:
            sentence += (
                f", where the LM head takes {percent(cost.head_share)} of an ordinary "
                f"step, an exit's matrix {percent(cost.transform_share)} and the "
                f"bookkeeping of a draft {percent(cost.overhead)}"
            )
        parts.append(sentence + ".")
    return "\n\n".join(parts)


def _shares(values: Sequence[float | None]) -> str:
    """Agreement by draft of a cycle, in one cell."""
    return " / ".join(map(percent, values))


def _nearest(figures: ExitFigures, threshold: float) -> list[str]:
    """Threshold, coverage and precision of the row nearest to a threshold."""
    rows = figures.thresholds
    if not rows:
        return ["-", "-", "-"]
    row = min(rows, key=lambda row: abs(row.threshold - threshold))
    return [short(row.threshold), percent(row.coverage), percent(row.precision)]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the leaves of a nested mapping with dotted names; None is no value."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{name}.")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield name, ", ".join(str(item) for item in value)
        elif value is not None:
            yield name, str(value)


def _public(text: str) -> str:
    """Cut absolute paths to their last part: they tell of a machine, not of heads."""
    if text.startswith("/"):  # with spaces, perhaps
        return PurePath(text).name
    return _ABSOLUTE_PATH.sub(r"\1", text)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(map(_table_row, [header, ["---"] * len(header), *rows]))


def _table_row(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(_text(cell) for cell in cells)} |"


def _text(text: str) -> str:
    """Text that stays text in Markdown: one line, no tags, no end of a cell."""
    escaped = _one_line(text).replace("&", "&amp;").replace("<", "&lt;")
    return escaped.replace("|", "\\|")


def _one_line(text: str) -> str:
    """Join lines, so that nothing can end a block."""
    return " ".join(text.split())
