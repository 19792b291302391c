# SPDX-License-Identifier: Apache-2.0
"""Whether two runs gave the same text, and where a difference is a tie.

In bfloat16 the same layers round differently for one row and for several, so a text may
part from the baseline's where the model itself cannot tell tokens apart. The rule (I6
in docs/design.md): a divergence is a tie where the baseline's logits of both tokens lie
within 2 bfloat16 ULP of its best one. In float32 there are no ties: every divergence is
an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TIE_ULPS = 2
NUM_TOP_LOGITS = 5
"""Best logits that are asked for: now and then three tokens are as good."""
_BFLOAT16_DIGITS = 7  # bits of the mantissa after the leading one

TopLogits = Sequence[Sequence[Sequence[float]]]
"""By token its best ones, two at least, as (token id, logit), best first."""


@dataclass(frozen=True)
class Parity:
    """The comparison of some texts with the baseline's.

    Attributes:
        same: Texts that are identical.
        ties: Texts that part at a tie.
        different: Texts that part elsewhere.
    """

    same: int = 0
    ties: int = 0
    different: int = 0


def top_logits(logprobs: Sequence[Mapping[int, Any]]) -> list[list[list[float]]]:
    """What vLLM returned for an answer, sorted.

    Args:
        logprobs: By token, vLLM's ``Logprob`` by token id, from an engine with
            ``logprobs_mode="raw_logits"``.
    """
    return [
        sorted(
            ([token, entry.logprob] for token, entry in candidates.items()),
            key=lambda pair: -pair[1],
        )
        for candidates in logprobs
    ]


def first_difference(baseline: Sequence[int], text: Sequence[int]) -> int | None:
    """Index of the first token that differs, None if the texts are identical."""
    for index, (expected, token) in enumerate(zip(baseline, text, strict=False)):
        if expected != token:
            return index
    return None if len(baseline) == len(text) else min(len(baseline), len(text))


def bfloat16_ulp(value: float) -> float:
    """Distance of neighbouring bfloat16 numbers at a value."""
    if value == 0:
        return 2.0**-133
    return 2.0 ** (math.floor(math.log2(abs(value))) - _BFLOAT16_DIGITS)


def is_tie(baseline: Sequence[int], text: Sequence[int], logits: TopLogits) -> bool:
    """Whether two different texts part at a tie.

    Args:
        baseline: The baseline's token ids.
        text: The other's.
        logits: The baseline's best logits at each of its tokens.
    """
    index = first_difference(baseline, text)
    assert index is not None, "the texts are identical"
    if index >= min(len(baseline), len(text), len(logits)) or len(logits[index]) < 2:
        return False
    best = logits[index][0][1]
    least = best - TIE_ULPS * bfloat16_ulp(best)
    as_good = {int(token) for token, logit in logits[index] if logit >= least}
    return {baseline[index], text[index]} <= as_good


def divergences(
    baseline: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    logits: Sequence[TopLogits] | None,
) -> list[dict[str, Any]]:
    """Where texts part, so that a result file can be judged later.

    Args:
        baseline: The baseline's token ids by prompt.
        texts: The other's.
        logits: The baseline's best logits by prompt, or None.

    Returns:
        For each text that is another: ``text`` and ``token``, its and the token's
        number; ``best``, the baseline's best logits there, as far as they are known;
        ``found``, the other's token; ``ulps``, the distance of the two best logits.
    """
    found = []
    for number, (expected, text) in enumerate(zip(baseline, texts, strict=True)):
        index = first_difference(expected, text)
        if index is None:
            continue
        best = list(logits[number][index : index + 1]) if logits is not None else []
        entry: dict[str, Any] = {
            "text": number,
            "token": index,
            "found": text[index] if index < len(text) else None,
        }
        if best and len(best[0]) > 1:
            (_, first), (_, other) = best[0][:2]
            entry |= {"best": best[0], "ulps": (first - other) / bfloat16_ulp(first)}
        found.append(entry)
    return found


def compare(
    baseline: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    logits: Sequence[TopLogits] | None,
) -> Parity:
    """Compare texts one by one.

    Args:
        baseline: The baseline's token ids by prompt.
        texts: The other's.
        logits: The baseline's best logits by prompt; None where no tie is allowed.
    """
    same = ties = 0
    for number, (expected, text) in enumerate(zip(baseline, texts, strict=True)):
        if list(expected) == list(text):
            same += 1
        elif logits is not None and is_tie(expected, text, logits[number]):
            ties += 1
    return Parity(same, ties, len(texts) - same - ties)


def judge(
    base: Mapping[str, Any], run: Mapping[str, Any], again: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Compare a run with the baseline's.

    Args:
        base: The baseline's run, with ``token_ids`` by prompt.
        run: The other's.
        again: The baseline once more, with ``top_logits`` as well; None where no tie
            is allowed.

    Returns:
        ``parity``, the counts, and ``divergences``, for the result file.
    """
    baseline, texts = base["token_ids"], run["token_ids"]
    logits = None
    if again is not None:
        logits = [
            best[: _last_shared(ids, expected)]
            for best, ids, expected in zip(
                again["top_logits"], again["token_ids"], baseline, strict=True
            )
        ]
    return {
        "parity": vars(compare(baseline, texts, logits)),
        "divergences": divergences(baseline, texts, logits),
    }


class BaselineLogits:
    """The baseline's best logits, generated again, untimed, where texts part."""

    def __init__(
        self, generate: Callable[[Sequence[int]], Mapping[str, Any]], alone: bool
    ) -> None:
        """Know nothing yet.

        Args:
            generate: The baseline's answers to prompts, given by number, as
                ``token_ids`` and ``top_logits``.
            alone: Whether requests run one at a time. Otherwise what a request gets
                depends on those beside it, and all of a run's are asked for.
        """
        self._generate = generate
        self._alone = alone
        self._known: dict[int, tuple[Sequence[int], TopLogits]] = {}

    def where_texts_part(
        self,
        prompts: Sequence[int],
        base: Mapping[str, Any],
        runs: Sequence[Mapping[str, Any]],
    ) -> dict[str, Any] | None:
        """What :func:`judge` needs.

        Args:
            prompts: Numbers of the runs' prompts.
            base: The baseline's run.
            runs: The others'.

        Returns:
            The baseline once more; None where all texts are identical. A prompt whose
            texts are identical has no logits.
        """
        texts = base["token_ids"]
        parted = {}
        for place, number in enumerate(prompts):
            found = [
                first_difference(texts[place], run["token_ids"][place]) for run in runs
            ]
            if indices := [index for index in found if index is not None]:
                parted[number] = texts[place], max(indices)
        if not parted:
            return None
        missing = [
            number for number, at in parted.items() if not self._tells(number, *at)
        ]
        if missing:
            asked = missing if self._alone else list(prompts)
            again = self._generate(asked)
            answers = zip(again["token_ids"], again["top_logits"], strict=True)
            for number, answer in zip(asked, answers, strict=True):
                if number not in self._known or number in missing:
                    self._known[number] = answer
        known = [
            self._known.get(number, (text, []))
            for number, text in zip(prompts, texts, strict=True)
        ]
        return {
            "token_ids": [ids for ids, _ in known],
            "top_logits": [logits for _, logits in known],
        }

    def _tells(self, number: int, text: Sequence[int], index: int) -> bool:
        """Whether what is known was generated behind the same tokens.

        In batches the baseline's own text may be another in every run.

        Args:
            number: A prompt.
            text: The baseline's text.
            index: Where others part from it.
        """
        ids, logits = self._known.get(number, ((), ()))
        same = list(ids[:index]) == list(text[:index])
        return same and len(logits) >= min(index + 1, len(text))


def _last_shared(again: Sequence[int], baseline: Sequence[int]) -> int | None:
    """Positions whose logits follow the same tokens: up to where both texts part."""
    index = first_difference(again, baseline)
    return None if index is None else index + 1
