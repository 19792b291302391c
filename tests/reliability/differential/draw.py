# SPDX-License-Identifier: Apache-2.0
"""Random engines and streams of requests.

Sizes are small where limits are to be met: model lengths, KV caches and token budgets
that hold little more than one request, prompts around block boundaries, caps as large
as a budget. Everything follows from the seed.
"""

from __future__ import annotations

import string
from functools import cache
from random import Random
from typing import Any

from tests.harness import MODEL, demo_corpus
from tests.reliability.differential.case import MEMORY_HEADS, Engine, Request

VOCABULARY = 1024
LAYERS = 16
FIRST_TOKEN = 3
"""Of ordinary text; those before have a meaning of their own."""

PROCESSOR = "tests.reliability.differential.processor:Shift"
_THINKING = {"reasoning_start_str": "Steps", "reasoning_end_str": "Answer"}
"""A problem ends with the one, and its answer begins with the other."""


def runner_of(seed: int, choice: str) -> str:
    """The model runner of a seed's engine; in "both" one in eight is V2."""
    if choice != "both":
        return choice
    return "v2" if seed % 8 == 7 else "v1"


def requests_of(runner: str, choice: str, requests: int) -> int:
    """Request-cases of an engine; in "both" fewer on V2, whose steps take long."""
    return requests // 4 if choice == "both" and runner == "v2" else requests


def draw_engine(seed: int, runner: str) -> Engine:
    """The engine of a seed."""
    draw = Random(f"engine {seed} {runner}")
    adadecode = _adadecode(draw)
    arguments = _arguments(draw, runner, adadecode["max_early_predictions"])
    own: dict[str, Any] = {}
    if runner == "v2" and draw.random() < 0.4:
        own["async_scheduling"] = False
    if runner == "v1" and draw.random() < 0.08:
        # Its start takes a minute, and compiled code depends on what warmed it up.
        own["enforce_eager"] = False
        adadecode["threshold"] = draw.choice((0.0, 0.3, 1.0, 1.0))
    return Engine(runner, arguments, adadecode, own)


def draw_stream(seed: int, number: int, engine: Engine, size: int) -> list[Request]:
    """One of an engine's streams.

    Args:
        seed: The engine's.
        number: The stream's.
        engine: What the requests are for.
        size: How many requests.
    """
    return _Stream(Random(f"stream {seed} {number}"), engine).requests(size)


def stream_sizes(seed: int, requests: int, runner: str) -> list[int]:
    """Sizes of an engine's streams, so many requests together."""
    draw = Random(f"sizes {seed}")
    sizes: list[int] = []
    while (left := requests - sum(sizes)) > 0:
        size = draw.randint(2, 6) if runner == "v2" else draw.choice((4, 8, 12, 18))
        sizes.append(min(size, left))
    return sizes


def _adadecode(draw: Random) -> dict[str, Any]:
    found: dict[str, Any] = {
        "threshold": draw.choice((0.0, 0.0, 0.3, 0.3, 0.75, 1.0)),
        "max_early_predictions": draw.choice((1, 2, 3, 5, 5, 8, 12, 16)),
    }
    if draw.random() < 0.3:
        found["exit_layers"] = draw.choice(([2], [4], [8], [2, 8], [4, 8]))
    if draw.random() < 0.2:
        found["gate"] = "acceptance"
    if draw.random() < 0.3:
        found["draft_vocabulary_size"] = draw.choice((16, 64, 500, 829))
    if draw.random() < 0.3:
        found["last_guess"] = False
    if draw.random() < 0.5:
        found["ngram"] = draw.choice(("off", "tail", "first", "chain"))
    if draw.random() < 0.3:
        found["policy"] = "cost"
    if draw.random() < 0.2:
        found["disable_by_batch_size"] = draw.choice((1, 2, 3, 5))
    if draw.random() < 0.3:
        found["heads"] = MEMORY_HEADS
        # They are not calibrated and rank no tokens.
        for name in ("gate", "draft_vocabulary_size", "exit_layers"):
            found.pop(name, None)
        if draw.random() < 0.7:
            found["exit_layers"] = draw.choice(([0], [0], [0, 2], [0, 4, 8], [2, 8]))
    return found


def _arguments(draw: Random, runner: str, cap: int) -> dict[str, Any]:
    length = draw.choice((48, 96, 96, 160, 256))
    block = draw.choice((32, 32, 32, 64))
    most = draw.choice((1, 2, 3, 4, 8, 8, 16))
    # A budget of tokens that room for one request's drafts exceeds.
    tight = draw.random() < 0.3
    if tight:
        most = min(most, cap)
    found: dict[str, Any] = {
        "max_model_len": length,
        "block_size": block,
        "max_num_seqs": most,
        # It is what leaves a request with a single token to compute.
        "enable_prefix_caching": draw.random() < (0.9 if tight else 0.5),
    }
    groups = 1
    if draw.random() < 0.3:
        # Attention windows in all layers or in every other one, which makes two groups
        # of the KV cache.
        kinds = draw.choice((["sliding"], ["sliding", "full"]))
        groups = len(kinds)
        types = [f"{kinds[layer % groups]}_attention" for layer in range(LAYERS)]
        window = draw.choice((16, 32, 50))
        found["hf_overrides"] = {"sliding_window": window, "layer_types": types}
    if draw.random() < 0.15:
        found["enable_chunked_prefill"] = False
        found["max_num_batched_tokens"] = max(length, most)
    else:
        least = max(most, draw.choice((cap + 1, cap + 2, 2 * cap + 1)))
        budget = draw.choice((least, least, 32, 33, 48, 2048))
        if tight:
            least = budget = draw.choice((cap, cap, cap + 1))
        found["max_num_batched_tokens"] = max(budget, least)
    # As few as one request needs; a window may need one more than the whole text.
    windows = "hf_overrides" in found
    blocks = groups * (-(-length // block) + windows) + 1
    kind = draw.random()
    if kind < 0.45:
        found["num_gpu_blocks_override"] = blocks + draw.randint(0, 2)
    elif kind < 0.75:
        found["num_gpu_blocks_override"] = 2 * blocks + draw.randint(0, 4)
    if draw.random() < 0.25:
        found["scheduling_policy"] = "priority"
    if draw.random() < 0.15:
        found["long_prefill_token_threshold"] = draw.choice((3, 8, 20))
    if draw.random() < 0.2:
        found["logprobs_mode"] = draw.choice(
            ("raw_logits", "processed_logprobs", "processed_logits")
        )
    if runner == "v1":
        if draw.random() < 0.12:
            found["logits_processors"] = [PROCESSOR]
        if draw.random() < 0.12:
            found["reasoning_config"] = dict(_THINKING)
    return found


@cache
def _texts() -> tuple[list[list[int]], list[str]]:
    """Problems with the beginnings of answers, as token ids, and their words."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{MODEL}/tokenizer.json")
    problems = demo_corpus().heldout_problems(60)
    words = sorted({word for text in problems for word in text.split()})
    return [tokenizer.encode(text).ids for text in problems], words


class _Stream:
    """Draws requests that have prompts, prefixes and neighbours in common."""

    def __init__(self, draw: Random, engine: Engine) -> None:
        self._draw = draw
        self._engine = engine
        self._arguments = engine.arguments
        self._length: int = engine.arguments["max_model_len"]
        self._prompts: list[list[int]] = []
        # How often an option is drawn: some streams have none, some are full of them.
        self._odd = draw.choice((0.0, 0.04, 0.08, 0.15))
        self._kind = draw.choice(("text", "random", "both"))
        # Some are about the last token of the vocabulary, beside which an index of -1
        # is, and requests that have one token left to compute when they arrive.
        self._edges = draw.random() < 0.35
        # With `logprob_token_ids` in a batch vLLM returns nothing but as many tokens as
        # the longest list has, also to requests that ask for others.
        self._listed = draw.choice((0, 0, 0, 1, 3))

    def requests(self, size: int) -> list[Request]:
        draw, arrives = self._draw, 0
        gap = draw.choice((0, 1, 2, 8))
        found = []
        for _ in range(size):
            found.append(self._request(arrives))
            arrives += draw.randint(0, gap)
        return found

    def _request(self, arrives: int) -> Request:
        draw = self._draw
        prompt = self._prompt()
        params = self._params(self._length - len(prompt))
        plain = "n" not in params and "stop" not in params
        chunks = []
        if plain and draw.random() < 0.05:
            params["max_tokens"] = draw.randint(1, 8)
            params.pop("min_tokens", None)
            left = self._length - len(prompt) - params["max_tokens"]
            after = 0
            for _ in range(draw.randint(1, 3)):
                piece = self._tokens(draw.randint(1, 20))
                left -= len(piece) + params["max_tokens"]
                after += draw.randint(1, 12)
                if left > 0:
                    chunks.append((after, piece))
        return Request(
            prompt=prompt,
            params=params,
            arrives=arrives,
            priority=draw.randint(0, 4) if self._urgent else 0,
            abort_after=draw.randint(0, 25) if draw.random() < 0.08 else None,
            chunks=chunks,
        )

    @property
    def _urgent(self) -> bool:
        return self._arguments.get("scheduling_policy") == "priority"

    def _prompt(self) -> list[int]:
        draw = self._draw
        most = self._length - 2
        if self._prompts and draw.random() < 0.3:
            return draw.choice(self._prompts)
        block = self._arguments["block_size"]
        lengths = (
            draw.randint(1, 4),
            draw.randint(1, min(40, most)),
            draw.randint(1, most),
            block * draw.randint(1, 3) + draw.choice((-1, 0, 1, 1, 2)),
            most + draw.choice((-3, -1, 0, 1)),
        )
        length = max(1, min(draw.choice(lengths), self._length - 1))
        if self._edges and draw.random() < 0.5:
            # Not cached, or cached up to the last token where it comes again.
            again = [p for p in self._prompts if len(p) % block == 1]
            if again and draw.random() < 0.5:
                return draw.choice(again)
            length = min(draw.choice((1, block + 1)), self._length - 1)
        prompt: list[int] = []
        if self._prompts and draw.random() < 0.25:
            earlier = draw.choice(self._prompts)
            prompt = earlier[: draw.randint(1, len(earlier))]
        prompt = (prompt + self._tokens(length))[: max(length, 1)]
        self._prompts.append(prompt)
        return prompt

    def _tokens(self, length: int) -> list[int]:
        """So many tokens of problems, or of nothing."""
        draw = self._draw
        if self._kind == "random" or (self._kind == "both" and draw.random() < 0.5):
            return [draw.randrange(FIRST_TOKEN, VOCABULARY) for _ in range(length)]
        texts = _texts()[0]
        found: list[int] = []
        while len(found) < length:
            found += draw.choice(texts)
        # The end of a problem rather than its beginning: an answer follows.
        return found[-length:]

    def _params(self, longest: int) -> dict[str, Any]:
        draw = self._draw
        some, many = draw.randint(3, 12), draw.randint(13, 40)
        most = draw.choice((1, 2, some, some, many, many, longest))
        params: dict[str, Any] = {"max_tokens": max(1, most)}
        if most == longest and draw.random() < 0.5:
            params["max_tokens"] = None
        if draw.random() < 0.6:
            params["temperature"] = 0
        else:
            # Sampled, from a single token.
            params |= {"temperature": 1, "top_k": 1}
            # vLLM's CPU runner ends on a seeded request whose prompt comes in chunks.
            whole = self._arguments.get("enable_chunked_prefill") is False
            if whole and draw.random() < 0.3:
                params["seed"] = draw.randint(0, 9)
            if self._odds():
                params["n"] = draw.choice((2, 3))
            if self._odds():
                params["min_p"] = draw.choice((0.05, 0.5))
            if self._odds():
                params["top_p"] = 0.9
        params |= self._ends(params["max_tokens"] or longest)
        params |= self._masks(params)
        params |= self._logprobs()
        params |= self._extra_args()
        if self._odds():
            params["repetition_penalty"] = draw.choice((0.7, 1.2, 1.6))
        if self._odds():
            params["presence_penalty"] = draw.choice((-1.0, 0.5, 2.0))
        if self._odds():
            params["frequency_penalty"] = draw.choice((-0.5, 0.5, 2.0))
        if "reasoning_config" in self._arguments and draw.random() < 0.5:
            params["thinking_token_budget"] = draw.choice((0, 1, 3, 10))
        return params

    def _odds(self) -> bool:
        return self._draw.random() < self._odd

    def _ends(self, longest: int) -> dict[str, Any]:
        """What ends a text."""
        draw = self._draw
        params: dict[str, Any] = {}
        if draw.random() < 0.5:
            params["ignore_eos"] = True
        if self._odds():
            words = _texts()[1]
            pieces = [draw.choice(words)[:3], draw.choice(string.ascii_lowercase)]
            params["stop"] = pieces[: draw.randint(1, 2)]
            if draw.random() < 0.5:
                params["include_stop_str_in_output"] = True
        if self._odds():
            params["stop_token_ids"] = self._some(draw.choice((1, 5, 40)))
        if self._odds():
            params["min_tokens"] = draw.randint(1, min(longest, 20))
        if self._odds():
            params["repetition_detection"] = {"max_pattern_size": 4, "min_count": 3}
        return params

    def _masks(self, params: dict[str, Any]) -> dict[str, Any]:
        """What forbids tokens; never all of them together."""
        draw = self._draw
        if self._odds():
            params.pop("ignore_eos", None)
            params.pop("min_tokens", None)
            return {"structured_outputs": draw.choice(_STRUCTURES)}
        edge = self._edges and draw.random() < 0.3
        if edge or self._odds():
            for name in ("min_tokens", "stop_token_ids"):
                params.pop(name, None)
            some = self._some(draw.choice((1, 1, 4, 300)))
            return {"allowed_token_ids": [VOCABULARY - 1] if edge else some}
        found: dict[str, Any] = {}
        if self._odds():
            found["bad_words"] = draw.sample(_texts()[1], draw.choice((1, 4, 30)))
        if self._odds():
            tokens = self._some(draw.choice((1, 8)))
            # One token alone, so strongly that it decides.
            strength = 10.0 if len(tokens) == 1 else 1.0
            found["logit_bias"] = {
                token: strength * draw.choice((-8.0, 3.0)) for token in tokens
            }
        return found

    def _logprobs(self) -> dict[str, Any]:
        draw = self._draw
        found: dict[str, Any] = {}
        if self._odds():
            if self._listed:
                tokens = range(FIRST_TOKEN, VOCABULARY)
                found["logprob_token_ids"] = draw.sample(tokens, self._listed)
            else:
                found["logprobs"] = draw.choice((0, 1, 3, 20))
        if self._odds():
            found["prompt_logprobs"] = draw.choice((0, 2))
        return found

    def _extra_args(self) -> dict[str, Any]:
        draw = self._draw
        options: dict[str, Any] = {}
        if draw.random() < 0.2:
            options["adadecode_threshold"] = draw.choice((0.0, 0.3, 0.9, 1.0))
        if draw.random() < 0.1:
            cap = self._engine.adadecode["max_early_predictions"]
            options["adadecode_max_early_predictions"] = draw.randint(0, cap)
        if draw.random() < 0.05:
            options["adadecode_enabled"] = False
        if draw.random() < 0.3:
            options["adadecode_ngram"] = draw.choice(("off", "tail", "first", "chain"))
        if "logits_processors" in self._arguments and draw.random() < 0.3:
            options["shift"] = draw.choice((1.0, 4.0))
        return {"extra_args": options} if options else {}

    def _some(self, count: int) -> list[int]:
        """Tokens that texts are full of, and others."""
        draw = self._draw
        texts = _texts()[0]
        common = [draw.choice(draw.choice(texts)) for _ in range(count)]
        rare = [draw.randrange(FIRST_TOKEN, VOCABULARY) for _ in range(count // 3)]
        return sorted(set(common + rare))


_STRUCTURES: tuple[dict[str, Any], ...] = (
    {"choice": ["yes", "no", "3 apples", "4 apples and 3 eggs"]},
    {"regex": "[0-9]{1,4}( [a-z]{1,6}){1,3}"},
    {"regex": "(ab|cd){2,9}!"},
    {
        "json": {
            "type": "object",
            "properties": {"answer": {"type": "integer"}, "sure": {"type": "boolean"}},
            "required": ["answer", "sure"],
            "additionalProperties": False,
        }
    },
)
