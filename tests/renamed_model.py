# SPDX-License-Identifier: Apache-2.0
"""The demo model with some of its tokens renamed: other weights, known texts.

A token's rows of embedding and LM head stand where another's stood, so the model does
with the new ids exactly what it did with the old ones. A gate that keeps rows of the
old LM head names old tokens, and everything that it predicts is rejected.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from adadecode_vllm.heads import load_heads_config, load_tensors
from tests.harness import HEADS, MODEL


@dataclass(frozen=True)
class RenamedModel:
    """The model and what its tokens are called.

    Attributes:
        directory: The checkpoint.
        names: The new id of each old one.
    """

    directory: Path
    names: list[int]

    def renamed(self, texts: list[list[int]]) -> list[list[int]]:
        return [[self.names[token] for token in text] for text in texts]


def rename_frequent_tokens(directory: Path, count: int) -> RenamedModel:
    """Give the most frequent tokens each other's ids, and save the model.

    Args:
        directory: Where to; must not exist.
        count: How many: a draft vocabulary of that size holds the same tokens as
            before.
    """
    shutil.copytree(MODEL, directory)
    ranking = load_tensors(HEADS, load_heads_config(HEADS)).draft_token_ids
    assert ranking is not None
    settings = json.loads((directory / "config.json").read_text())
    special = [settings[f"{name}_token_id"] for name in ("bos", "eos", "pad")]
    moved = [token for token in ranking[:count].tolist() if token not in special]
    names = torch.arange(settings["vocab_size"])
    names[moved] = torch.tensor(moved[1:] + moved[:1])
    path = directory / "model.safetensors"
    weights = load_file(path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        renamed = weights[name].clone()
        renamed[names] = weights[name]
        weights[name] = renamed
    save_file(weights, path, {"format": "pt"})
    return RenamedModel(directory, names.tolist())
