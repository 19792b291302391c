# SPDX-License-Identifier: Apache-2.0
"""Heads as they are saved and published, for tests."""

import shlex
from pathlib import Path
from typing import Any

import torch

from adadecode_vllm.heads import ExitHeadsConfig
from adadecode_vllm.toolkit.publishing.save import save_pretrained
from tests.tiny import FINGERPRINT

D = 8
BASE = "meta-llama/Llama-3.1-8B-Instruct"
FILES = ["README.md", "config.json", "model.safetensors"]
DRAFT_VOCABULARY_ROW = (
    "| Draft vocabulary | the 4 most frequent tokens of the training text |"
)
TRAINING = {
    "argv": ["/home/ann/.venv/bin/adadecode", "train", BASE, "--data", "/data/x y/gsm"],
    "license": "llama3.1",
    "datasets": ["openai/gsm8k", "my texts"],
    "settings": {"objective": "kl", "epochs": 100, "max_length": None},
    "calibration": {"1": {"slope": 1.25}},
    "held_out": {
        "epoch": 7,
        "loss": {"1": 0.4567, "3": 0.1},
        "agreement": {"1": 0.8123, "3": 0.9},
    },
    "data": {"path": "/data/runs/gsm8k", "url": "https://example.org/a/b"},
    "note": "a | b\n<b>bold</b>",
}


def make_config(**values: Any) -> ExitHeadsConfig:
    defaults: dict[str, Any] = {
        "exit_layers": [1, 3],
        "hidden_size": D,
        "vocab_size": 32,
        "num_hidden_layers": 4,
        "base_model": BASE,
        "lm_head_fingerprint": FINGERPRINT,
    }
    return ExitHeadsConfig(**defaults | values)


def make_weights() -> dict[int, torch.Tensor]:
    torch.manual_seed(0)
    return {layer: torch.randn(D, D) for layer in (1, 3)}


def save_trained(directory: Path) -> Path:
    """Save heads with the card of their training.

    Returns:
        The directory.
    """
    save_pretrained(directory, make_weights(), make_config(), training=TRAINING)
    return directory


def serve_words(card: str) -> list[str]:
    """Read the serve command as a shell would."""
    start = card.index("vllm serve")
    command = card[start : card.index("```", start)]
    return shlex.split(command.replace("\\\n", ""))


def argument(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]
