# SPDX-License-Identifier: Apache-2.0
"""The one schema for every way to configure AdaDecode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from adadecode_vllm.errors import AdaDecodeError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_Options = TypeVar("_Options", bound=BaseModel)

CONFIG_KEY = "adadecode"
"""Where the options stand in vLLM's ``additional_config``."""

DEFAULT_CAP = 8
"""Most unverified tokens of a request, where nobody says."""

# vLLM's rejection sampler verifies at most this many drafts of a request at once
# (vllm/v1/sample/rejection_sampler.py, MAX_SPEC_LEN).
_MAX_EARLY_PREDICTIONS = 128

Ngram = Literal["off", "tail", "first", "chain"]
"""Drafts by n-gram lookup beside the exit heads'."""

OF_THRESHOLDS = frozenset(
    {"threshold", "gate", "last_guess", "synthetic_acceptance_rate"}
)
"""Options that mean something where thresholds decide; giving one chooses that."""

_MAX_CHARACTERS = 200
_MAX_MISTAKES = 5


class AdaDecodeConfig(BaseModel):
    """Options of the engine; the same in Python, JSON and on the command line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    heads: str = Field(
        min_length=1,
        description="The served model's exit heads: a directory, or a repository on "
        "the Hugging Face Hub as namespace/name or namespace/name@revision.",
    )
    exit_layers: tuple[int, ...] | None = Field(
        default=None,
        min_length=1,
        description="Exits to use, as layer counts: a subset of the heads' own. "
        "Default: all of them.",
    )
    threshold: float = Field(
        default=0.75,
        ge=0.0,
        le=1.0,
        description="Predict early when an exit head's top probability exceeds this, "
        "and not where it probably pays. At 1 nothing is ever predicted early.",
    )
    max_early_predictions: int = Field(
        default=DEFAULT_CAP,
        ge=1,
        le=_MAX_EARLY_PREDICTIONS,
        description="Most unverified tokens of a request (the cap).",
    )
    gate: Literal["probability", "acceptance"] = Field(
        default="probability",
        description="What the threshold is compared with: the exit head's top "
        "probability, or the probability that the prediction is accepted, which "
        "calibrated heads derive from it.",
    )
    draft_vocabulary_size: int | None = Field(
        default=None,
        ge=0,
        description="Let the gates look at this many tokens only, the most frequent of "
        "the heads' training text; 0 for the whole vocabulary. Default: all tokens "
        "that the heads rank, if they are at most half of the vocabulary and the LM "
        "head is not quantized.",
    )
    last_guess: bool = Field(
        default=True,
        description="Where no exit is confident, also submit the last exit's guess if "
        "it is probably worth its verification.",
    )
    ngram: Ngram = Field(
        default="chain",
        description="Draft what followed the same last tokens earlier in the request, "
        "too. tail: after the last early prediction, or where there is none. first: "
        "look there first, and ask the exits only where nothing is found. chain: token "
        "by token, whichever of lookup and exit is more probably right. Default: "
        "chain; off where the policy is threshold.",
    )
    lookup: Literal["ngram", "suffix"] = Field(
        default="ngram",
        description="What looks up. ngram: n-gram lookup, in the request. "
        "suffix: the suffix trees of arctic-inference, which must be installed, in the "
        "request and in earlier answers.",
    )
    disable_by_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="Predict nothing early in steps with more requests than this. "
        "Default: no limit.",
    )
    policy: Literal["cost", "threshold"] = Field(
        default="cost",
        description="cost: draft only at batch sizes where tokens come faster with "
        "drafts than without, and only as far as one more draft probably pays. What "
        "drafts cost is measured while serving, at about a hundredth of the time. "
        "threshold: predict early where an exit's probability exceeds the threshold, "
        "as the paper does. Default: cost; threshold where a threshold is given.",
    )
    synthetic_acceptance_rate: float | None = Field(
        default=None,
        ge=0.0,
        le=1.0,
        description="For measurements only: leave this share of the early predictions "
        "and corrupt the rest, so that they are rejected. The text stays the model's.",
    )
    enabled: bool = Field(
        default=True,
        description="False serves the model as if the plugin were not installed.",
    )

    @model_validator(mode="before")
    @classmethod
    def _threshold_decides(cls, given: dict[str, Any]) -> dict[str, Any]:
        """A threshold that was given decides, in place of what is measured."""
        options = dict(given)
        if not OF_THRESHOLDS.isdisjoint(options):
            options.setdefault("policy", "threshold")
        if options.get("policy") == "threshold":
            options.setdefault("ngram", "off")
        return options

    @field_validator("exit_layers")
    @classmethod
    def _increasing(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and list(value) != sorted(set(value)):
            raise ValueError(f"{format_value(list(value))} is not strictly increasing")
        return value


def parse_config(options: Any) -> AdaDecodeConfig:
    """Validate options as a user gave them.

    Args:
        options: The dictionary under ``additional_config["adadecode"]``.

    Returns:
        The configuration.

    Raises:
        AdaDecodeError: With one sentence for every option that is wrong.
    """
    if isinstance(options, AdaDecodeConfig):
        return options
    if not isinstance(options, Mapping):
        raise AdaDecodeError(
            "--adadecode-config: expected an object with options, got "
            f'{format_value(options)}. Write for example {{"threshold": 0.8}}.'
        )
    return validated(AdaDecodeConfig, options, _sentence, _unknown)


def engine_config(vllm_config: VllmConfig) -> AdaDecodeConfig | None:
    """The options that start-up wrote into an engine's configuration.

    Args:
        vllm_config: The engine's configuration.

    Returns:
        The options; None for an engine without AdaDecode.
    """
    additional_config = vllm_config.additional_config
    if not isinstance(additional_config, Mapping):
        return None
    return enabled_config(additional_config.get(CONFIG_KEY))


def enabled_config(options: Any) -> AdaDecodeConfig | None:
    """Validate options as a user gave them, unless they switch AdaDecode off.

    Args:
        options: The dictionary under ``additional_config["adadecode"]``; None where
            there is none.

    Returns:
        The configuration; None where AdaDecode is not asked for, or off. Whoever
        switches it off need not name heads.

    Raises:
        AdaDecodeError: With one sentence for every option that is wrong.
    """
    if options is None:
        return None
    if (
        isinstance(options, Mapping)
        and options.get("enabled") is False
        and "heads" not in options
    ):
        return None
    config = parse_config(options)
    return config if config.enabled else None


def validated(
    model: type[_Options],
    given: Mapping[str, Any],
    sentence: Callable[[Any], str],
    unknown: Callable[[str], str],
) -> _Options:
    """Read options, and name every mistake.

    Args:
        model: What they must be.
        given: A user's options, by name.
        sentence: Says what is wrong, from one of pydantic's details.
        unknown: Says that there is no option of a name.

    Raises:
        AdaDecodeError: If an option is unknown or wrong.
    """
    known = model.model_fields
    wrong = [unknown(name) for name in given if name not in known]
    try:
        found = model(**{name: value for name, value in given.items() if name in known})
    except ValidationError as error:
        details = [sentence(detail) for detail in error.errors()]
        raise AdaDecodeError(in_one_line([*details, *wrong])) from None
    if wrong:
        raise AdaDecodeError(in_one_line(wrong))
    return found


def format_value(value: Any) -> str:
    """A user's value for a sentence: in one line, printable, and not long.

    Args:
        value: Anything that JSON or Python can hold.

    Returns:
        Its representation, cut short where it is long.
    """
    try:
        return _cut(repr(value))
    except (ValueError, RecursionError):
        # Python refuses integers of thousands of digits and very deep nesting.
        return f"{type(value).__name__} too large to be shown"


def format_text(text: str) -> str:
    """The same of a text, without quotes."""
    return _cut(repr(text)[1:-1])


def _cut(text: str) -> str:
    if len(text) <= _MAX_CHARACTERS:
        return text
    return f"{text[:_MAX_CHARACTERS]}..."


def in_one_line(sentences: Iterable[str]) -> str:
    """Join the sentences on a user's mistakes, or the first of them if many.

    Args:
        sentences: One for each mistake.

    Returns:
        The message.
    """
    found = list(sentences)
    more = len(found) - _MAX_MISTAKES
    if more > 0:
        found[_MAX_MISTAKES:] = [f"Further mistakes: {more}."]
    return " ".join(found)


def _unknown(name: Any) -> str:
    known = ", ".join(AdaDecodeConfig.model_fields)
    return (
        f"--adadecode-config: unknown option {format_value(name)}. Options are "
        f"{known}; remove or correct it."
    )


def _sentence(detail: Any) -> str:
    name = ".".join(str(part) for part in detail["loc"])
    option = name.split(".")[0]
    if detail["type"] == "missing" and name == "heads":
        return (
            "--adadecode-heads: no exit heads given. Name the served model's heads, or "
            "make some with `adadecode data` and `adadecode train`."
        )
    reason = detail["msg"].removeprefix("Value error, ")
    field = AdaDecodeConfig.model_fields.get(option)
    meaning = f" ({(field.description or '').rstrip('.')})" if field is not None else ""
    return (
        f"--adadecode-config: {name} = {format_value(detail.get('input'))} is refused: "
        f"{reason}. Give a valid {option}{meaning}."
    )


def engine_args(heads: str, **options: Any) -> dict[str, Any]:
    """Keyword arguments that make ``vllm.LLM`` or ``EngineArgs`` use AdaDecode.

    ``LLM(MODEL, **engine_args(heads=DIR))``.

    Args:
        heads: Directory with the exit heads.
        **options: Further fields of `AdaDecodeConfig`.

    Returns:
        ``{"additional_config": {"adadecode": {...}}}``.

    Raises:
        AdaDecodeError: If an option is wrong.
    """
    given = {"heads": str(heads), **options}
    config = parse_config(given)
    return {"additional_config": {CONFIG_KEY: config.model_dump(include=set(given))}}
