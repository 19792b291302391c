# SPDX-License-Identifier: Apache-2.0
"""Whether heads can be used, and with this model; no model is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads import Heads
from adadecode_vllm.heads.files import heads_named
from adadecode_vllm.toolkit.doctor.finding import Finding
from adadecode_vllm.toolkit.doctor.model import ModelFacts

_NO_TORCH = Finding(
    "fit",
    "warning",
    "torch is not installed, so the heads' weights and the model's LM head cannot be "
    "compared.",
    "Install it together with vLLM, and ask again.",
)


def look_up_heads(model: str) -> tuple[str | None, Finding]:
    """Find the heads that a server without `--adadecode-heads` would use.

    Args:
        model: A directory, or a name on the Hub.

    Returns:
        The directory of the heads, None if there are none on this machine; and what to
        say of it.
    """
    try:
        from adadecode_vllm.heads.registry import find_registered_heads
    except ImportError:
        return None, replace(_NO_TORCH, check="registry")
    try:
        found = find_registered_heads(model)
    except AdaDecodeError as error:
        return None, failure("registry", error)
    if found is None:
        return None, Finding(
            "registry",
            "warning",
            f"No heads are registered for {model}.",
            "Name its heads with --adadecode-heads, or make some with `adadecode data` "
            "and `adadecode train`.",
        )
    if found.directory is None:
        return None, Finding(
            "registry",
            "ok",
            f"Heads for {model} are on the Hub: {found.repository}.",
            f"Add --adadecode-heads {found.repository} to fetch and use them.",
        )
    text = f"{found.directory} has heads for it. A server uses them unasked."
    return str(found.directory), Finding("registry", "ok", text)


def read_heads(name: str) -> Heads:
    """Find heads and read their description.

    Args:
        name: A directory, or a name on the Hugging Face Hub.

    Returns:
        The heads; the header of their weights agrees with the description.

    Raises:
        AdaDecodeError: They cannot be used.
    """
    with heads_named("HEADS"):
        heads = Heads.find(name)
        heads.check()
        return heads


def check_heads(heads: Heads) -> Finding:
    """Describe heads, and say what they lack."""
    config = heads.config
    exits = ", ".join(map(str, config.exit_layers))
    ranked = config.draft_vocabulary
    lacks, steps = [], []
    if config.calibration is None:
        lacks.append("calibration, which the gate `acceptance` needs")
        steps.append("train with a held-out share")
    if ranked is None:
        lacks.append("a draft vocabulary, which makes gates cheaper")
        steps.append("run `adadecode draft-vocabulary`")
    text = f"Exits after layers {exits} of {config.num_hidden_layers}, {config.dtype}"
    if config.memory:
        text += ", with memory of the token before"
    figures = {
        "exit_layers": config.exit_layers,
        "calibrated": config.calibration is not None,
        "draft_vocabulary": ranked,
        "memory": config.memory,
        "base_model": config.base_model,
    }
    if not lacks:
        ranking = f"a ranking of {ranked:,} tokens"
        return Finding(
            "heads", "ok", f"{text}, calibrated, with {ranking}.", figures=figures
        )
    return Finding(
        "heads",
        "ok",
        f"{text}; without {' and without '.join(lacks)}.",
        f"If you want that: {', or '.join(steps)}.",
        figures,
    )


def check_fit(heads: Heads, model: ModelFacts) -> Iterator[Finding]:
    """Compare heads with a model: shapes, and the LM head's fingerprint.

    Args:
        heads: The heads.
        model: The model.
    """
    try:
        from adadecode_vllm.engine.heads_fit import check_heads_fit
    except ImportError:
        yield _NO_TORCH
        return
    try:
        with heads_named("HEADS"):
            compared = check_heads_fit(heads, model, str(model.directory))
    except AdaDecodeError as error:
        yield failure("fit", error)
        return
    if compared:
        yield Finding("fit", "ok", "These heads were made for this model's LM head.")
    else:
        yield Finding(
            "fit",
            "warning",
            "The shapes fit. The LM head could not be compared without loading the "
            "model: it is quantized, or not in a local safetensors checkpoint.",
            "vLLM compares it at start-up, where its weights are not packed.",
        )


def identity_exits(heads: Heads) -> list[int]:
    """The exits whose T is the identity, which takes no memory; reads all weights.

    Args:
        heads: The heads.

    Returns:
        Their layer counts; none where torch is not installed.

    Raises:
        AdaDecodeError: The weights cannot be read, or hold NaN or infinity.
    """
    try:
        from adadecode_vllm.heads.io import is_identity
    except ImportError:
        return []
    with heads_named("HEADS"):
        weights = heads.tensors.weights  # refuses what is damaged
    return [layer for layer, weight in weights.items() if is_identity(weight)]


def failure(check: str, error: AdaDecodeError) -> Finding:
    """What a message for a user says, as a finding; it names the remedy itself."""
    text = str(error)
    return Finding(check, "problem", text if text.endswith(".") else f"{text}.")
