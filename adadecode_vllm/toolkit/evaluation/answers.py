# SPDX-License-Identifier: Apache-2.0
"""A model's own answers, and what the exits say on them and off them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from adadecode_vllm.toolkit.evaluation.known_exits import Answer, Scored
from adadecode_vllm.toolkit.evaluation.measure import read_exit
from adadecode_vllm.toolkit.states.teacher import KeyValues, Teacher
from adadecode_vllm.toolkit.states.texts import Text

# Positions whose logits are in memory at a time.
_ROWS = 512
# What heads with memory gave for the last drafts: more than one cycle needs.
_KEPT_OUTPUTS = 256

KEPT_ANSWERS = 8
"""Answers, those that were asked last, of which is kept what was computed off them."""


def known_answers(
    teacher: Teacher,
    exit_layers: Sequence[int],
    weights: Mapping[int, torch.Tensor],
    texts: Sequence[Text],
    *,
    max_length: int | None = None,
    pass_tokens: int = 1024,
    draft_token_ids: torch.Tensor | None = None,
    memory: Mapping[int, torch.Tensor] | None = None,
    kept_answers: int = KEPT_ANSWERS,
    advance: Callable[[int], None] = lambda answers: None,
) -> list[Answer]:
    """Prepare a model's own answers for the simulation.

    Args:
        teacher: The model.
        exit_layers: Layer counts of the exits.
        weights: T by exit.
        texts: Texts with prompts. An answer that is not the model's own at temperature
            0 is cut where it differs first.
        max_length: The engine's `max_model_len`; None for the model's own.
        pass_tokens: Most tokens of one pass of the model.
        draft_token_ids: The tokens that the gates look at; None for all.
        memory: U by exit; None for heads without memory.
        kept_answers: Answers that are played at a time. Only so many keep keys, values
            and states of what leads off them; others compute the same again when they
            are asked.
        advance: Called with how many further texts have been read.

    Returns:
        The answers that have at least two tokens.
    """
    layers = [*exit_layers, teacher.num_layers]
    max_length = max_length or teacher.max_length
    stops = teacher.eos_token_ids()
    asked = _AskedLast(kept_answers)
    lm_head = teacher.lm_head
    if draft_token_ids is not None:  # one copy for all
        lm_head = lm_head[draft_token_ids.to(teacher.device)]
    answers = []
    lengths = [len(text.token_ids) for text in texts]
    for group in teacher.groups(lengths, pass_tokens):
        members = [texts[index] for index in group]
        streams = teacher.streams([text.token_ids for text in members], layers)
        start = 0
        for text in members:
            end = start + len(text.token_ids)
            here = {layer: streams[layer][start + text.first : end] for layer in layers}
            start = end
            own: list[int] = []
            for part in here[teacher.num_layers].split(_ROWS):
                logits, _ = read_exit(part, None, teacher.lm_head)
                own += logits.argmax(-1).tolist()
            same = 0
            while same < len(text.answer) and own[same] == text.answer[same]:
                same += 1
            tokens = text.answer[:same]
            if len(tokens) < 2:
                continue
            ended = tokens[-1] in stops
            answers.append(
                Answer(
                    tokens=tokens,
                    scores=KnownScores(
                        teacher,
                        exit_layers,
                        weights,
                        text,
                        tokens,
                        here,
                        lm_head,
                        asked,
                        draft_token_ids,
                        memory,
                    ),
                    stops=stops,
                    # One that did not end by itself was cut at its limit.
                    max_tokens=1 << 30 if ended else len(tokens),
                    length_limit=max_length - len(text.prompt),
                    prompt=text.prompt,
                )
            )
        advance(len(members))
    return answers


class _AskedLast:
    """The answers that were asked last; the others let go of what they computed."""

    def __init__(self, most: int) -> None:
        """Let at most so many keep it."""
        self._most = most
        self._answers: dict[KnownScores, None] = {}

    def __call__(self, answer: KnownScores) -> None:
        """An answer is asked."""
        self._answers.pop(answer, None)
        self._answers[answer] = None
        while len(self._answers) > self._most:
            oldest = next(iter(self._answers))
            del self._answers[oldest]
            oldest.forget()


class KnownScores:
    """What the exits say, on the answer and, where predictions were wrong, off it."""

    def __init__(
        self,
        teacher: Teacher,
        exit_layers: Sequence[int],
        weights: Mapping[int, torch.Tensor],
        text: Text,
        answer: Sequence[int],
        streams: Mapping[int, torch.Tensor],
        lm_head: torch.Tensor,
        asked: Callable[[KnownScores], None],
        draft_token_ids: torch.Tensor | None = None,
        memory: Mapping[int, torch.Tensor] | None = None,
    ) -> None:
        """Read the exits along the answer.

        Args:
            teacher: The model.
            exit_layers: Layer counts of the exits.
            weights: T by exit.
            text: The text.
            answer: The tokens of the answer that are used.
            streams: By layer, states from the prompt's last token on; those of the
                last layer too.
            lm_head: (V, d), or (m, d) of the tokens that the gates look at.
            asked: Called when this answer computes something that it keeps.
            draft_token_ids: The tokens that the gates look at; None for all.
            memory: U by exit; None for heads without memory.
        """
        self._lm_head = lm_head
        self._token_ids = draft_token_ids
        self._teacher = teacher
        self._asked = asked
        self._exit_layers = list(exit_layers)
        self._weights = weights
        self._memory = memory
        self._prompt = tuple(text.prompt)
        self._answer = tuple(answer)
        # By number of answer tokens, where the drafts of a cycle need them; copies, so
        # that the states of other texts are freed. Off the answer, by all tokens.
        kept = {} if memory is None else streams
        self._on_answer = {layer: states.clone() for layer, states in kept.items()}
        # By exit, the first drafts of all cycles that may start on the answer.
        final = streams[teacher.num_layers]
        self._first = [
            self._read(self._first_outputs(layer, streams[layer], final))
            for layer in exit_layers
        ]
        self.forget()

    def forget(self) -> None:
        """Let go of what can be computed again, to the bit, when it is asked for.

        The model runs the tokens off an answer one at a time, from the same keys and
        values on, however many of them it has run before.
        """
        self._off_answer: dict[tuple[int, ...], dict[int, torch.Tensor]] = {}
        # Of the whole answer, and of the last text off it.
        self._answer_cache: KeyValues | None = None
        self._branch: tuple[tuple[int, ...], KeyValues] | None = None
        self._later: dict[tuple[tuple[int, ...], tuple[int, ...], int], Scored] = {}
        self._outputs: dict[
            tuple[tuple[int, ...], tuple[int, ...], int], torch.Tensor
        ] = {}

    def __call__(
        self, prefix: tuple[int, ...], drafted_by: tuple[int, ...], exit_index: int
    ) -> Scored:
        """Top token and its probability at an exit.

        Args:
            prefix: The answer tokens so far, drafts included.
            drafted_by: The exits that made the drafts, which are the last tokens.
            exit_index: The exit that is asked.

        Returns:
            What it says of the next token.
        """
        # Without memory a draft is a token like any other.
        chain = drafted_by if self._memory is not None else ()
        on_answer = prefix == self._answer[: len(prefix)]
        if on_answer and not chain:
            return self._first[exit_index][len(prefix)]
        key = prefix, chain, exit_index
        self._asked(self)
        if key not in self._later:
            (self._later[key],) = self._read(self._output(*key))
        return self._later[key]

    def _first_outputs(
        self, layer: int, states: torch.Tensor, final: torch.Tensor
    ) -> torch.Tensor:
        """By number of answer tokens, what an exit's LM head reads without drafts."""
        outputs = states @ self._weights[layer].T
        if self._memory is not None:
            # Nothing is known before the prompt's last token, where no cycle starts.
            outputs[1:] += final[:-1] @ self._memory[layer].T
        return outputs

    def _output(
        self, prefix: tuple[int, ...], drafted_by: tuple[int, ...], exit_index: int
    ) -> torch.Tensor:
        """(1, d), what an exit's LM head reads."""
        key = prefix, drafted_by, exit_index
        if key in self._outputs:
            return self._outputs[key]
        layer = self._exit_layers[exit_index]
        output = self._state(prefix, layer) @ self._weights[layer].T
        if self._memory is not None:
            if drafted_by:
                before = self._output(prefix[:-1], drafted_by[:-1], drafted_by[-1])
            else:
                final = self._on_answer[self._teacher.num_layers]
                before = final[len(prefix) - 1][None]
            output = output + before @ self._memory[layer].T
        if len(self._outputs) >= _KEPT_OUTPUTS:
            self._outputs.clear()
        self._outputs[key] = output
        return output

    def _state(self, prefix: tuple[int, ...], layer: int) -> torch.Tensor:
        """(1, d), what an exit reads at the last of these tokens."""
        if prefix == self._answer[: len(prefix)]:
            return self._on_answer[layer][len(prefix)][None]
        if prefix not in self._off_answer:
            cache, tokens = self._start_of(prefix)
            streams = self._teacher.extend(cache, tokens, self._exit_layers)
            self._branch = prefix, cache
            last = {key: states[-1:] for key, states in streams.items()}
            self._off_answer[prefix] = last
        return self._off_answer[prefix][layer]

    def _start_of(self, prefix: tuple[int, ...]) -> tuple[KeyValues, tuple[int, ...]]:
        """Keys and values of a text's beginning that is known, and its other tokens."""
        if self._branch is not None and prefix[:-1] == self._branch[0]:
            return self._branch[1], prefix[-1:]
        if self._answer_cache is None:
            self._answer_cache = KeyValues()
            self._teacher.extend(
                self._answer_cache, self._prompt + self._answer, self._exit_layers
            )
        pairs = enumerate(zip(prefix, self._answer, strict=False))
        same = next((i for i, (token, own) in pairs if token != own), len(self._answer))
        known = self._answer_cache.beginning(len(self._prompt) + same)
        return known, prefix[same:]

    def _read(self, outputs: torch.Tensor) -> list[Scored]:
        """Top tokens and their probabilities, by row."""
        scored: list[Scored] = []
        for part in outputs.split(_ROWS):
            logits, log_odds = read_exit(part, None, self._lm_head)
            tokens = logits.argmax(-1).cpu()
            if self._token_ids is not None:
                tokens = self._token_ids[tokens]
            probabilities = log_odds.double().sigmoid().float()
            scored += zip(tokens.tolist(), probabilities.tolist(), strict=True)
        return scored
