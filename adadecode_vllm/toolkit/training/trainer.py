# SPDX-License-Identifier: Apache-2.0
"""The training loop: Adam on cached states, with exact resumption."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.files import writing
from adadecode_vllm.heads.io import save_tensors
from adadecode_vllm.toolkit.states.cache import StateSource
from adadecode_vllm.toolkit.training import together
from adadecode_vllm.toolkit.training.objective import (
    ExitLoss,
    evaluate,
    evaluate_unrolled,
)
from adadecode_vllm.toolkit.training.settings import TrainSettings

logger = logging.getLogger(__name__)

_ADAM = ("exp_avg", "exp_avg_sq")

Matrices = dict[int, torch.Tensor]


class Processes(together.Processes, Protocol):
    """The part of accelerate's ``Accelerator`` that the loop needs."""

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        """Sum a tensor over all processes."""


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: Steps done.
        epoch: Epochs done.
        best_loss: Lowest held-out loss, averaged over exits.
        best_epoch: The epoch that reached it.
        history: ``steps`` and ``held_out``, see :class:`Trainer`.
    """

    step: int = 0
    epoch: int = 0
    best_loss: float = math.inf
    best_epoch: int = 0
    history: dict[str, list[dict[str, Any]]] = field(
        default_factory=lambda: {"steps": [], "held_out": []}
    )


class Trainer:
    """Trains the matrices of every exit against the final layer.

    ``progress.history["steps"]`` holds step, epoch, learning_rate and loss (nats per
    token, by exit); ``["held_out"]`` holds epoch, loss, agreement and, with memory,
    ``agreement_by_draft``, of which ``agreement`` is the first. Where the LM head has
    the rows of a draft vocabulary only, its ``draft_vocabulary`` is their number: the
    final layer's top token is then its top one among those.
    """

    def __init__(
        self,
        exit_layers: Sequence[int],
        lm_head: torch.Tensor,
        training: StateSource,
        held_out: StateSource | None,
        settings: TrainSettings,
        processes: Processes,
        start: Mapping[int, tuple[torch.Tensor, torch.Tensor | None]] | None = None,
    ) -> None:
        """Start at T = I and U = 0, or at the LM head for full-size heads.

        Args:
            exit_layers: Layer counts of the exits.
            lm_head: (V, d), the frozen LM head.
            training: States of the texts to train on.
            held_out: States of the others; None for none.
            settings: The options.
            processes: This process among those that train together.
            start: By exit, T and U to start at instead, (d, d) float32; U is None for
                heads without memory.
        """
        self.settings = settings
        self.lm_head = lm_head
        self.training = training
        self.held_out = held_out
        self.processes = processes
        self.progress = Progress()
        size, device = lm_head.shape[1], lm_head.device
        first = torch.eye(size, device=device)
        if settings.head == "full":
            first = lm_head.float()
        self.weights = {layer: first.clone() for layer in exit_layers}
        self.memory: Matrices | None = None
        if settings.memory:
            self.memory = {layer: torch.zeros_like(first) for layer in exit_layers}
        for layer, (weight, memory) in (start or {}).items():
            self.weights[layer].copy_(weight)
            if self.memory is not None and memory is not None:
                self.memory[layer].copy_(memory)
        # By the names of a checkpoint.
        self._trained = {str(layer): weight for layer, weight in self.weights.items()}
        for layer, matrix in (self.memory or {}).items():
            self._trained[f"{layer}.memory"] = matrix
        for matrix in self._trained.values():
            matrix.grad = torch.zeros_like(matrix)
        self._best = {
            name: matrix.detach().clone() for name, matrix in self._trained.items()
        }
        self._optimizer = torch.optim.Adam(
            self._trained.values(), lr=settings.learning_rate
        )
        self.steps_per_epoch = max(1, math.ceil(len(training) / settings.batch_size))
        self.total_steps = settings.epochs * self.steps_per_epoch

    def run(
        self,
        checkpoint: Callable[[], None] = lambda: None,
        on_step: Callable[[dict[str, Any]], None] = lambda record: None,
        on_epoch: Callable[[dict[str, Any]], None] = lambda record: None,
    ) -> tuple[Matrices, Matrices | None]:
        """Train from where :attr:`progress` stands to the end.

        Args:
            checkpoint: Called after every epoch, in every process.
            on_step: Called with each step's record.
            on_epoch: Called with each epoch's held-out record.

        Returns:
            By exit T, or the full-size head, and U, None without memory: those with the
            lowest held-out loss; the last ones without held-out texts.

        Raises:
            AdaDecodeError: If the loss is not a number.
        """
        settings, progress = self.settings, self.progress
        while progress.epoch < settings.epochs and not self._stalled():
            order = self._order(progress.epoch)
            for first in range(0, len(order), settings.batch_size):
                on_step(self._step(order[first : first + settings.batch_size]))
            progress.epoch += 1
            if self.held_out is not None and len(self.held_out):
                record = self._validate()
                on_epoch(record)
            checkpoint()
        found = self._best if progress.best_epoch else self._trained
        weights = {layer: found[str(layer)] for layer in self.weights}
        if self.memory is None:
            return weights, None
        return weights, {layer: found[f"{layer}.memory"] for layer in weights}

    def _stalled(self) -> bool:
        progress = self.progress
        behind = progress.epoch - progress.best_epoch
        stalled = bool(
            self.settings.patience
            and progress.best_epoch
            and behind >= self.settings.patience
        )
        if stalled:
            logger.info(
                "no better held-out loss for %d epochs: stopped after epoch %d",
                behind,
                progress.epoch,
            )
        return stalled

    def _order(self, epoch: int) -> list[int]:
        """The texts' order in an epoch, a function of the seed and the epoch only."""
        generator = torch.Generator().manual_seed(
            self.settings.seed * 1_000_003 + epoch
        )
        return torch.randperm(len(self.training), generator=generator).tolist()

    def _rate(self, step: int) -> float:
        warm_up = max(1, round(self.settings.warmup * self.total_steps))
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.total_steps))
        return self.settings.learning_rate * min(1.0, (step + 1) / warm_up) * cosine

    def _step(self, batch: list[int]) -> dict[str, Any]:
        gradients = []
        for matrix in self._trained.values():
            assert matrix.grad is not None
            gradients.append(matrix.grad.zero_())
        losses = self._evaluate(self.training, self._mine(batch), learn=True)
        tokens = max(1, sum(draft.tokens for draft in next(iter(losses.values()))))
        for gradient in gradients:
            if self.processes.num_processes > 1:
                gradient.copy_(self.processes.reduce(gradient, "sum"))
            gradient.div_(tokens)
        loss = {str(layer): _mean_loss(drafts) for layer, drafts in losses.items()}
        step = self.progress.step
        if not all(math.isfinite(value) for value in loss.values()):
            raise AdaDecodeError(
                f"--learning-rate {self.settings.learning_rate}: the loss is not a "
                f"number at step {step + 1}; give a lower rate"
            )
        rate = self._rate(step)
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        self.progress.step += 1
        record = {
            "step": self.progress.step,
            "epoch": self.progress.epoch + 1,
            "learning_rate": rate,
            "loss": loss,
        }
        self.progress.history["steps"].append(record)
        return record

    def _validate(self) -> dict[str, Any]:
        assert self.held_out is not None
        totals = self._zeros()
        size = self.settings.batch_size
        for first in range(0, len(self.held_out), size):
            batch = list(range(first, min(first + size, len(self.held_out))))
            part = self._evaluate(self.held_out, self._mine(batch), learn=False)
            for layer, drafts in part.items():
                for total, draft in zip(totals[layer], drafts, strict=True):
                    total.add(draft)
        progress = self.progress
        record: dict[str, Any] = {
            "epoch": progress.epoch,
            "loss": {str(k): _mean_loss(drafts) for k, drafts in totals.items()},
            "agreement": {str(k): drafts[0].agreement for k, drafts in totals.items()},
        }
        if self.memory is not None:
            record["agreement_by_draft"] = {
                str(k): [draft.agreement for draft in drafts]
                for k, drafts in totals.items()
            }
        if self.settings.draft_vocabulary is not None:
            record["draft_vocabulary"] = len(self.lm_head)
        progress.history["held_out"].append(record)
        mean = sum(record["loss"].values()) / len(totals)
        if mean < progress.best_loss:
            progress.best_loss, progress.best_epoch = mean, progress.epoch
            for name, matrix in self._trained.items():
                self._best[name].copy_(matrix)
        return record

    def _mine(self, batch: list[int]) -> list[int]:
        return batch[self.processes.process_index :: self.processes.num_processes]

    def _evaluate(
        self,
        source: StateSource,
        batch: list[int],
        *,
        learn: bool,
    ) -> dict[int, list[ExitLoss]]:
        """Losses of a batch by exit and draft, summed over all processes.

        The gradients of this process are added where the optimizer looks for them.
        """
        totals = self._losses(source, batch, learn) if batch else self._zeros()
        if self.processes.num_processes > 1:
            drafts = [draft for exit_drafts in totals.values() for draft in exit_drafts]
            sums = torch.tensor(
                [[t.loss, t.agreed, t.tokens] for t in drafts],
                dtype=torch.float64,
                device=self.lm_head.device,
            )
            rows = self.processes.reduce(sums, "sum").tolist()
            for draft, (loss, agreed, tokens) in zip(drafts, rows, strict=True):
                draft.loss, draft.agreed, draft.tokens = loss, int(agreed), int(tokens)
        return totals

    def _losses(
        self, source: StateSource, batch: list[int], learn: bool
    ) -> dict[int, list[ExitLoss]]:
        """Losses of this process's part."""
        settings = self.settings
        states = source.states(batch)
        by_layer = dict(zip(source.layers, states, strict=True))
        if self.memory is None:
            losses = evaluate(
                self.weights,
                by_layer,
                states[-1],
                self.lm_head,
                objective=settings.objective,
                chunk_tokens=settings.chunk_tokens,
                gradients=_gradients(self.weights) if learn else None,
            )
            return {layer: [loss] for layer, loss in losses.items()}
        gradients = None
        if learn:
            of_memory = _gradients(self.memory)
            gradients = {
                layer: (gradient, of_memory[layer])
                for layer, gradient in _gradients(self.weights).items()
            }
        return evaluate_unrolled(
            self.weights,
            self.memory,
            by_layer,
            states[-1],
            source.lengths(batch),
            self.lm_head,
            objective=settings.objective,
            chunk_tokens=settings.chunk_tokens,
            unroll=settings.unroll,
            gradients=gradients,
        )

    def _zeros(self) -> dict[int, list[ExitLoss]]:
        drafts = self.settings.drafts
        return {layer: [ExitLoss() for _ in range(drafts)] for layer in self.weights}

    def save_checkpoint(self, path: Path, run_key: str) -> None:
        """Write everything that resumption needs into one file.

        Args:
            path: A safetensors file; replaced in one step.
            run_key: What the run depends on; see :meth:`load_checkpoint`.

        Raises:
            OSError: The file cannot be written; what was there is still there.
        """
        tensors = {}
        for name, matrix in self._trained.items():
            tensors[f"weight.{name}"] = matrix
            tensors[f"best.{name}"] = self._best[name]
            for moment in _ADAM:
                tensors[f"{moment}.{name}"] = self._optimizer.state[matrix][moment]
        progress = self.progress
        metadata = {
            "run_key": run_key,
            "step": str(progress.step),
            "epoch": str(progress.epoch),
            "best_loss": progress.best_loss.hex(),
            "best_epoch": str(progress.best_epoch),
            "history": json.dumps(progress.history),
        }
        contiguous = {name: t.contiguous().cpu() for name, t in tensors.items()}
        with writing(path) as temporary:
            save_tensors(temporary, contiguous, metadata)

    def load_checkpoint(self, path: Path, run_key: str) -> None:
        """Continue a run; the weights end up bit for bit as without interruption.

        Args:
            path: What :meth:`save_checkpoint` wrote.
            run_key: Must be that of the checkpoint.

        Raises:
            AdaDecodeError: If the checkpoint cannot be read.
            RuntimeError: If it is another run's.
        """
        from safetensors import SafetensorError

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("run_key") != run_key:
                    raise RuntimeError("the checkpoint is another run's")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise AdaDecodeError(
                f"OUT {path.parent.parent}: the checkpoint {path.name} cannot be read "
                f"({error}); start again with --overwrite"
            ) from error
        self.progress = Progress(
            step=int(metadata["step"]),
            epoch=int(metadata["epoch"]),
            best_loss=float.fromhex(metadata["best_loss"]),
            best_epoch=int(metadata["best_epoch"]),
            history=json.loads(metadata["history"]),
        )
        for name, matrix in self._trained.items():
            matrix.copy_(tensors[f"weight.{name}"])
            self._best[name].copy_(tensors[f"best.{name}"])
            state: dict[str, Any] = {"step": torch.tensor(float(self.progress.step))}
            for moment in _ADAM:
                state[moment] = tensors[f"{moment}.{name}"].to(matrix.device)
            self._optimizer.state[matrix] = state


def _gradients(matrices: Matrices) -> Matrices:
    """By exit, where the optimizer looks for the gradient."""
    return {k: matrix.grad for k, matrix in matrices.items() if matrix.grad is not None}


def _mean_loss(drafts: Sequence[ExitLoss]) -> float:
    """Nats per token, over all drafts."""
    return sum(d.loss for d in drafts) / max(1, sum(d.tokens for d in drafts))
