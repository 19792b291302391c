# SPDX-License-Identifier: Apache-2.0
"""Options of a training run, and their presets."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationInfo,
    field_validator,
)

UnitInterval = Annotated[float, Field(ge=0, lt=1)]


class TrainSettings(BaseModel):
    """What decides the trained weights, besides the model and the text.

    The defaults are the paper's (arXiv 2506.03700, section 4.1).

    Attributes:
        objective: ``kl``: KL from the final layer's distribution; ``greedy``:
            cross-entropy against its top token.
        head: ``transform``: T of shape (d, d) before the shared LM head; ``full``: a
            head of shape (V, d) of its own, started at the LM head.
        start: What T, and U, are before training: ``identity``: T = I and U = 0;
            ``ridge``: least squares.
        epochs: Passes over the text.
        batch_size: Texts in a batch, over all processes.
        learning_rate: Adam's, at its peak.
        warmup: Share of the steps over which the rate rises; a cosine to zero follows.
        held_out: Share of the texts that is not trained on.
        patience: Epochs without a better held-out loss after which training stops; 0
            for never.
        seed: Of the order and the held-out share.
        max_length: Tokens after which a text is cut; None for the model's length.
        draft_vocabulary: The objective sees only so many tokens, those that the texts
            have most often, as if there were no others; None for all.
        memory: Whether heads also read the state of the token before.
        unroll: Drafts of a cycle that heads with memory are trained on; the loss is
            the mean over their tokens.
        chunk_tokens: Tokens whose distributions are in memory at a time.
        pass_tokens: Tokens in one pass of the model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    objective: Literal["kl", "greedy"] = "kl"
    head: Literal["transform", "full"] = "transform"
    start: Literal["identity", "ridge"] = "identity"
    epochs: PositiveInt = 100
    batch_size: PositiveInt = 128
    learning_rate: Annotated[float, Field(gt=0)] = 5e-3
    warmup: UnitInterval = 0.03
    held_out: UnitInterval = 0.05
    patience: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    max_length: PositiveInt | None = None
    draft_vocabulary: Annotated[int | None, Field(ge=2)] = None
    memory: bool = False
    unroll: PositiveInt = 3
    chunk_tokens: PositiveInt = 512
    pass_tokens: PositiveInt = 1024

    @field_validator("draft_vocabulary")
    @classmethod
    def _check_vocabulary(cls, value: int | None, others: ValidationInfo) -> int | None:
        if value is not None and others.data.get("head") == "full":
            raise ValueError("full-size heads have the whole vocabulary")
        return value

    @field_validator("start")
    @classmethod
    def _check_start(cls, value: str, others: ValidationInfo) -> str:
        if value == "ridge" and others.data.get("head") == "full":
            raise ValueError("full-size heads have a start of their own")
        return value

    @field_validator("memory")
    @classmethod
    def _check_memory(cls, value: bool, others: ValidationInfo) -> bool:
        if value and others.data.get("head") == "full":
            raise ValueError("full-size heads have no memory")
        return value

    @property
    def drafts(self) -> int:
        """Drafts of a cycle that differ for the heads: one without memory."""
        return self.unroll if self.memory else 1

    def digest(self, *more: str) -> str:
        """Hash of the options and of what else decides the weights."""
        unused = set() if self.memory else {"unroll"}
        text = "\n".join((self.model_dump_json(exclude=unused), *more))
        return hashlib.sha256(text.encode()).hexdigest()


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    # Texts of a small model train in minutes; fewer passes lose little there.
    "quick": {"epochs": 10, "patience": 3},
    "best": {"epochs": 10, "patience": 3, "memory": True, "start": "ridge"},
}
