# SPDX-License-Identifier: Apache-2.0
"""The ways of decoding that are compared, and what each asks of its engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from adadecode_vllm.config import DEFAULT_CAP
from adadecode_vllm.engine.suffix import is_installed
from adadecode_vllm.errors import AdaDecodeError

BASELINE = "baseline"

VARIANTS: Mapping[str, str] = {
    BASELINE: "vLLM alone at its defaults, the plugin not loaded",
    "installed": "the plugin installed but not asked for",
    "adadecode": "AdaDecode with the given options",
    "paper": "AdaDecode as in the paper: all exits, threshold 0.75 on the head's "
    "probability, 5 early predictions at most, no guesses",
    "threshold-1": "AdaDecode that never predicts early",
    "single-exit": "AdaDecode with one fixed exit: the first, or single-exit:LAYER",
    "submit-all": "AdaDecode with one fixed exit that always predicts, as in "
    "submit-all:8",
    "exits": "AdaDecode with some of the exits, as in exits:2+8",
    "t-identity": "AdaDecode with the model's own LM head at the exits (T = I)",
    "heads": "AdaDecode with other heads, as in heads:DIRECTORY",
    "defaults": "AdaDecode with other heads, at its defaults whatever the options say, "
    "as in defaults:DIRECTORY",
    "draft-vocabulary": "AdaDecode whose gates look at the most frequent tokens only, "
    "as in draft-vocabulary:8192",
    "ngram-tail": "AdaDecode with n-gram drafts after its early predictions",
    "ngram-first": "the same, the n-gram lookup before the exits",
    "ngram-chain": "the same, token by token the more probable of both",
    "no-guess": "AdaDecode that never submits an unsure guess of the last exit",
    "ngram": "vLLM's n-gram speculation (prompt look-up); with other than AdaDecode's "
    "number of drafts as in ngram:5",
    "suffix": "vLLM's suffix decoding, where arctic-inference is installed; as in "
    "suffix:5",
    "draft-model": "vLLM's speculation with a small model, --draft-model; as in "
    "draft-model:5",
    "transformers": "Hugging Face Transformers' generate",
    "transformers-early-exit": "the same with assistant_early_exit at the first exit",
}

_SPECULATIVE = ("ngram", "suffix", "draft-model")
_TRANSFORMERS = ("transformers", "transformers-early-exit")
_WITHOUT_PLUGIN = (BASELINE, "installed", *_SPECULATIVE)
_PAPER = {"threshold": 0.75, "max_early_predictions": 5, "last_guess": False}
_WORDS = {
    "threshold": "threshold",
    "max_early_predictions": "cap",
    "synthetic_acceptance_rate": "acceptance",
}
# What stands behind the colon, as a message names it.
_VALUES = {
    "single-exit": "a layer",
    "submit-all": "a layer",
    "exits": "layers",
    "heads": "a directory",
    "defaults": "a directory",
    "draft-vocabulary": "a number of tokens",
    **dict.fromkeys(_SPECULATIVE, "a number of drafts"),
}


@dataclass(frozen=True)
class Variant:
    """One way of decoding.

    Attributes:
        name: As it was given; ``single-exit:4`` is a variant of kind ``single-exit``.
        kind: A key of :data:`VARIANTS`.
        value: What stood behind the colon; empty where nothing did.
    """

    name: str
    kind: str
    value: str = ""

    @property
    def predicts_early(self) -> bool:
        """Whether the variant runs AdaDecode."""
        return self.kind not in (*_WITHOUT_PLUGIN, *_TRANSFORMERS)

    @property
    def uses_vllm(self) -> bool:
        """Whether the variant is a vLLM engine."""
        return self.kind not in _TRANSFORMERS


@dataclass(frozen=True)
class Case:
    """One row of a comparison.

    Attributes:
        variant: The variant's name.
        batch_size: Requests at a time.
        policy: Options that a running engine can change, where they differ from the
            settings': ``threshold``, ``max_early_predictions``,
            ``synthetic_acceptance_rate``.
    """

    variant: str
    batch_size: int = 1
    policy: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The variant with what was changed, such as ``adadecode, threshold 0.5``."""
        changes = [f"{_WORDS[name]} {value:g}" for name, value in self.policy.items()]
        return ", ".join([self.variant, *changes])


@dataclass(frozen=True)
class EngineSettings:
    """What all variants of a comparison have in common.

    Attributes:
        model: The model's directory or name.
        heads: The exit heads' directory.
        dtype: Of the model's weights.
        identity_heads: Untrained heads for ``t-identity``.
        draft_model: The small model's directory, for ``draft-model``.
        threshold: For early predictions, where thresholds shall decide.
        max_early_predictions: The cap, and the number of speculative tokens of vLLM's
            own methods.
        adadecode: More options of AdaDecode.
        arguments: More arguments of ``vllm.LLM``.
        kv_cache_gib: KV cache of each engine. Without it vLLM takes a share of the
            machine's memory, for each of the engines that run side by side.
    """

    model: str
    heads: str
    dtype: str = "auto"
    identity_heads: str | None = None
    draft_model: str | None = None
    threshold: float | None = None
    max_early_predictions: int = DEFAULT_CAP
    adadecode: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    kv_cache_gib: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for another process or a result file."""
        return asdict(self)


def parse_variants(text: str) -> list[Variant]:
    """Read a comma-separated list of variants.

    Args:
        text: For example ``baseline,adadecode,single-exit:2``.

    Returns:
        The variants, in that order.

    Raises:
        AdaDecodeError: If one is unknown or named twice.
    """
    variants: list[Variant] = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        kind, _, value = name.partition(":")
        if kind not in VARIANTS:
            raise AdaDecodeError(
                f"--variants: unknown variant {kind!r}. Choose among "
                f"{', '.join(VARIANTS)}."
            )
        if not _value_fits(kind, value):
            wanted = _VALUES.get(kind)
            takes = f"takes {wanted}, {VARIANTS[kind]}" if wanted else "takes no value"
            raise AdaDecodeError(f"--variants: {name!r}: {kind} {takes}. Correct it.")
        if name in (variant.name for variant in variants):
            raise AdaDecodeError(f"--variants: {name!r} is named twice. Name it once.")
        variants.append(Variant(name, kind, value))
    if not variants:
        raise AdaDecodeError(
            f"--variants: no variant is named. Choose among {', '.join(VARIANTS)}."
        )
    return variants


def _value_fits(kind: str, value: str) -> bool:
    if kind in ("single-exit", *_SPECULATIVE):
        return not value or value.isdecimal()
    if kind == "submit-all":
        return value.isdecimal()
    if kind == "exits":
        return all(part.isdecimal() for part in value.split("+"))
    if kind in ("heads", "defaults"):
        return bool(value)
    if kind == "draft-vocabulary":
        return value.isdecimal()
    return not value


def reason_to_skip(
    variant: Variant, settings: EngineSettings, batch_sizes: list[int]
) -> str | None:
    """Why a variant cannot run here, known before anything is started.

    Args:
        variant: The variant.
        settings: The comparison's settings.
        batch_sizes: Requests at a time that are asked for.

    Returns:
        The end of a sentence that begins with the variant's name, or None.
    """
    if variant.kind == "draft-model":
        if settings.draft_model is None:
            return "needs a small model with the same vocabulary; give --draft-model"
        if not Path(settings.draft_model).is_dir():
            return f"found no directory {settings.draft_model}; correct --draft-model"
    if variant.kind == "suffix" and not is_installed():
        return "needs the package arctic-inference; install it"
    if variant.kind == "transformers-early-exit" and min(batch_sizes) > 1:
        return "can only generate for one request at a time; add --batch-sizes 1"
    return None


def with_identity_heads(settings: EngineSettings, directory: Path) -> EngineSettings:
    """Make untrained heads for ``t-identity``, at the exits of the trained ones.

    Args:
        settings: The comparison's settings.
        directory: Where to write them.

    Returns:
        The settings that name them.
    """
    from adadecode_vllm.heads import init_heads, load_heads_config

    config = load_heads_config(settings.heads)
    init_heads(settings.model, directory, config.exit_layers, config.dtype)
    return replace(settings, identity_heads=str(directory))


def llm_arguments(variant: Variant, settings: EngineSettings) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` for a variant.

    Args:
        variant: A variant with ``uses_vllm``.
        settings: The comparison's settings.

    Returns:
        Keyword arguments. What is not said here or by the user stays vLLM's default,
        except prefix caching, which would make a repeat of a prompt another job, and
        vLLM's statistics, which the latencies are read from.
    """
    options: dict[str, Any] = {
        "model": settings.model,
        "dtype": settings.dtype,
        "kv_cache_memory_bytes": int(settings.kv_cache_gib * (1 << 30)),
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        # Only a run that asks for logprobs returns any: the check of ties does.
        "logprobs_mode": "raw_logits",
    }
    if variant.predicts_early:
        options.update(_adadecode(variant, settings))
    elif variant.kind in _SPECULATIVE:
        options["speculative_config"] = _speculation(variant, settings)
    return {**options, **settings.arguments}


def _adadecode(variant: Variant, settings: EngineSettings) -> dict[str, Any]:
    from adadecode_vllm import engine_args
    from adadecode_vllm.heads import load_heads_config

    if variant.kind == "paper":
        return engine_args(settings.heads, **_PAPER)
    if variant.kind == "defaults":
        return engine_args(variant.value)
    options = dict(settings.adadecode)
    heads = settings.heads
    if variant.kind == "single-exit":
        first = load_heads_config(heads).exit_layers[0]
        options["exit_layers"] = [int(variant.value) if variant.value else first]
    elif variant.kind == "submit-all":
        options["exit_layers"] = [int(variant.value)]
    elif variant.kind == "exits":
        options["exit_layers"] = [int(layer) for layer in variant.value.split("+")]
    elif variant.kind == "heads":
        heads = variant.value
    elif variant.kind == "draft-vocabulary":
        options["draft_vocabulary_size"] = int(variant.value)
    elif variant.kind == "no-guess":
        options["last_guess"] = False
    elif variant.kind in ("ngram-tail", "ngram-first", "ngram-chain"):
        options["ngram"] = variant.kind.removeprefix("ngram-")
    elif variant.kind == "t-identity":
        assert settings.identity_heads is not None, "made before the variants start"
        heads = settings.identity_heads
        # Untrained heads have neither a ranking of tokens nor a calibration.
        options.pop("draft_vocabulary_size", None)
        options.pop("gate", None)
    options["max_early_predictions"] = settings.max_early_predictions
    if settings.threshold is not None:
        options["threshold"] = settings.threshold
    if variant.kind in ("threshold-1", "submit-all"):
        options["threshold"] = 1.0 if variant.kind == "threshold-1" else 0.0
        options |= {"policy": "threshold", "ngram": "off"}
    return engine_args(heads, **options)


def _speculation(variant: Variant, settings: EngineSettings) -> dict[str, Any]:
    tokens = int(variant.value or settings.max_early_predictions)
    if variant.kind == "ngram":
        return {
            "method": "ngram",
            "num_speculative_tokens": tokens,
            "prompt_lookup_max": 4,
            "prompt_lookup_min": 2,
        }
    if variant.kind == "suffix":
        # Without answers of earlier requests: every repeat asks for the same texts.
        return {
            "method": "suffix",
            "num_speculative_tokens": tokens,
            "suffix_decoding_max_cached_requests": 0,
        }
    return {
        "method": "draft_model",
        "model": settings.draft_model,
        "num_speculative_tokens": tokens,
    }
