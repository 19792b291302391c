# SPDX-License-Identifier: Apache-2.0
"""What is sampled has plain vLLM's distribution, whatever is predicted early (I5).

A tiny model with a vocabulary of 24 tokens continues one prompt thousands of times,
with AdaDecode and with plain vLLM, and a two-sample chi-square test compares the
pairs of neighbouring tokens at each place of the continuations. Continuations are
independent of each other, so the test of one place is sound; the places together are
judged by their smallest p-value (Bonferroni). All random numbers are torch's, seeded,
so the outcome is always the same.

Two deliberately biased engines show that the test has the power to see a bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adadecode_vllm.heads import init_heads
from tests.harness import adadecode_options, configure, start_engine, stats
from tests.tiny_families import ENGINE, EXITS, inspected_here, save_family

pytestmark = pytest.mark.engine

VOCABULARY = 24
PROMPT = {"prompt_token_ids": [3, 17, 9, 20, 5, 11]}
CONTINUATIONS = 10_000
BIASED = 4000  # enough to notice a bias
TOKENS = 5  # the first is sampled with the prompt, the others under drafting
BATCH = 256
# Below this many tokens of both engines a cell of the table joins the others.
FEWEST = 20
SAME = 1e-3
DIFFERENT = 1e-6

SETTINGS: dict[str, dict[str, Any]] = {
    "temperature 1": {"temperature": 1.0},
    "cooler, top-k, top-p": {"temperature": 0.6, "top_k": 9, "top_p": 0.85},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("small-vocabulary")
    save_family(
        directory / "model",
        "Llama",
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
    )
    init_heads(str(directory / "model"), directory / "heads", EXITS, "float32")
    return directory


def start(directory: Path, **options: Any) -> Any:
    values = {**ENGINE, "max_num_seqs": BATCH, **options}
    return start_engine(str(directory / "model"), **values)


def sample(
    llm: Any,
    seed: int,
    continuations: int,
    prompt: dict[str, Any] = PROMPT,
    **options: Any,
) -> np.ndarray:
    """(continuations, TOKENS) token ids."""
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=TOKENS, ignore_eos=True, detokenize=False, **options
    )
    torch.manual_seed(seed)
    outputs = llm.generate([prompt] * continuations, params, use_tqdm=False)
    return np.array([list(output.outputs[0].token_ids) for output in outputs])


def p_value(some: np.ndarray, others: np.ndarray) -> float:
    """How likely such a difference is between equally many draws of one distribution.

    Args:
        some: (N, TOKENS) token ids.
        others: (N, TOKENS) token ids.

    Returns:
        The smallest p-value of all places, times their number.
    """
    assert some.shape == others.shape
    found = [
        _p_value_of_pairs(some[:, place - 1 : place + 1], others[:, place - 1 :][:, :2])
        for place in range(1, TOKENS)
    ]
    return min(1.0, min(found) * len(found))


def _p_value_of_pairs(some: np.ndarray, others: np.ndarray) -> float:
    table = np.array(
        [
            np.bincount(pairs[:, 0] * VOCABULARY + pairs[:, 1], minlength=VOCABULARY**2)
            for pairs in (some, others)
        ]
    )
    rare = table.sum(0) < FEWEST
    table = np.concatenate([table[:, ~rare], table[:, rare].sum(1, keepdims=True)], 1)
    table = table[:, table.sum(0) > 0]
    freedom = table.shape[1] - 1
    assert freedom > 8
    statistic = (np.diff(table, axis=0)[0] ** 2 / table.sum(0)).sum()
    halves = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(halves[0], halves[1]))


@pytest.fixture(scope="module")
def baseline(directory: Path) -> dict[str, np.ndarray]:
    with inspected_here(), start(directory) as llm:
        return {
            name: sample(llm, 1, CONTINUATIONS, **options)
            for name, options in SETTINGS.items()
        }


@pytest.fixture(scope="module")
def engine(directory: Path, baseline: dict[str, np.ndarray]) -> Iterator[Any]:
    options = adadecode_options(str(directory / "heads"), threshold=0.0)
    with inspected_here(), start(directory, **options) as llm:
        yield llm


def test_the_statistic_accepts_what_is_the_same(
    baseline: dict[str, np.ndarray],
) -> None:
    """Halves of one sample; and it tells two temperatures apart."""
    for tokens in baseline.values():
        half = len(tokens) // 2
        assert p_value(tokens[:half], tokens[half:]) > SAME
    assert p_value(*baseline.values()) < DIFFERENT


@pytest.mark.feature("temperature, top-p, top-k", "supported")
@pytest.mark.parametrize(
    ("name", "threshold"),
    [
        ("temperature 1", 0.0),
        ("temperature 1", 0.3),
        pytest.param("cooler, top-k, top-p", 0.0, marks=pytest.mark.slow),
        ("cooler, top-k, top-p", 0.3),
    ],
)
def test_the_distribution_is_that_of_the_baseline(
    engine: Any, baseline: dict[str, np.ndarray], name: str, threshold: float
) -> None:
    configure(engine, threshold=threshold)
    found = sample(engine, 2, CONTINUATIONS, **SETTINGS[name])
    counted = stats(engine)
    accepted, rejected = sum(counted["accepted"]), sum(counted["rejected"])
    assert accepted > 500
    assert rejected > 500
    if threshold == 0.0:
        # Next tokens that a draft had a say in.
        assert accepted + rejected >= 20_000
    assert found[:, 1:].size >= 20_000
    assert p_value(found, baseline[name]) > SAME


def test_ngram_drafts_leave_the_distribution_alone(engine: Any) -> None:
    """Behind a prompt in which most pairs of tokens occur, so that most are drafted."""
    draw = np.random.default_rng(0)
    prompt = {"prompt_token_ids": draw.integers(0, VOCABULARY, 250).tolist()}
    options = {"prompt": prompt, **SETTINGS["temperature 1"]}
    configure(engine, threshold=0.5, ngram="chain")
    found = sample(engine, 2, BIASED, **options)
    counted = stats(engine)
    configure(engine, ngram="off")
    assert counted["ngram_accepted"] > 50
    assert counted["ngram_rejected"] > 1000
    configure(engine, threshold=1.0)
    without = sample(engine, 3, BIASED, **options)
    assert sum(stats(engine)["early_predictions"]) == 0
    assert p_value(found, without) > SAME


def test_drafts_accepted_without_verification_are_noticed(
    engine: Any, baseline: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A biased engine: what a gate is sure of is taken without verification."""
    from vllm.v1.sample import rejection_sampler

    monkeypatch.setattr(
        rejection_sampler,
        "generate_uniform_probs",
        lambda count, *_: torch.zeros(count, dtype=torch.float64),
    )
    configure(engine, threshold=0.3)
    found = sample(engine, 2, BIASED, temperature=1.0)
    counted = stats(engine)
    assert sum(counted["accepted"]) > 800
    assert sum(counted["rejected"]) == 0
    assert p_value(found, baseline["temperature 1"][:BIASED]) < DIFFERENT


def test_drafts_withdrawn_after_verification_are_noticed(
    engine: Any, baseline: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A biased engine, less plainly: where a draft is rejected, it samples anew.

    As if the gate had looked at the sampled token and drafted only where that agreed.
    What replaces a rejected draft must be drawn from what the others leave.
    """
    from vllm.v1.sample import rejection_sampler

    def sample_anew(*arguments: Any) -> torch.Tensor:
        target_probabilities = arguments[5]
        drawn = torch.multinomial(target_probabilities, 1).flatten()
        return drawn.to(arguments[3].dtype)

    monkeypatch.setattr(rejection_sampler, "sample_recovered_tokens", sample_anew)
    configure(engine, threshold=0.0)
    found = sample(engine, 2, BIASED, temperature=1.0)
    counted = stats(engine)
    assert sum(counted["accepted"]) > 800
    assert sum(counted["rejected"]) > 800
    assert p_value(found, baseline["temperature 1"][:BIASED]) < DIFFERENT


@pytest.mark.feature("temperature, top-p, top-k", "supported")
def test_each_request_of_a_batch_has_its_own_temperature(
    engine: Any, baseline: dict[str, np.ndarray]
) -> None:
    """Greedy requests between sampled ones: vLLM gives each draft its request's."""
    from vllm import SamplingParams

    common: dict[str, Any] = {
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "detokenize": False,
    }
    kinds = [
        SamplingParams(**common, **SETTINGS["temperature 1"]),
        SamplingParams(temperature=0, **common),
        SamplingParams(**common, **SETTINGS["cooler, top-k, top-p"]),
    ]
    configure(engine, threshold=0.0)
    torch.manual_seed(3)
    outputs = engine.generate(
        [PROMPT] * len(kinds) * 4000, kinds * 4000, use_tqdm=False
    )
    texts = np.array([list(output.outputs[0].token_ids) for output in outputs])
    hot, greedy, cool = texts[0::3], texts[1::3], texts[2::3]
    assert len(np.unique(greedy, axis=0)) == 1
    assert sum(stats(engine)["rejected"]) > 2000
    assert p_value(hot, baseline["temperature 1"][:4000]) > SAME
    assert p_value(cool, baseline["cooler, top-k, top-p"][:4000]) > SAME
