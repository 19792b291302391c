# SPDX-License-Identifier: Apache-2.0
"""Training from a model and text to heads, with kills and mistakes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file

from adadecode_vllm.config import parse_config
from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads import load_heads_config, load_tensors
from adadecode_vllm.heads.io import HeadsTensors
from adadecode_vllm.toolkit.evaluation.measure import measure
from adadecode_vllm.toolkit.evaluation.run import SimulationGrid, evaluate_heads
from adadecode_vllm.toolkit.states.cache import LiveStates
from adadecode_vllm.toolkit.states.teacher import Teacher
from adadecode_vllm.toolkit.states.texts import Text, load_texts, split_held_out
from adadecode_vllm.toolkit.training.options import Reporter, RunOptions
from adadecode_vllm.toolkit.training.recommend import recommend
from adadecode_vllm.toolkit.training.ridge import ridge_heads
from adadecode_vllm.toolkit.training.run import train_heads
from adadecode_vllm.toolkit.training.settings import TrainSettings
from tests.data_directory import write_rows
from tests.tiny import NUM_LAYERS, VOCAB_SIZE
from tests.training import SETTINGS, Killed, train, weights_of

MEMORY: dict[str, Any] = {"memory": True, "unroll": 2, "start": "ridge"}


def memory_of(heads: Path) -> dict[int, torch.Tensor]:
    memory = load_tensors(heads, load_heads_config(heads)).memory
    assert memory is not None
    return memory


def test_training_brings_the_exits_closer(
    teacher: Teacher, data: Path, tmp_path: Path
) -> None:
    record = train(teacher, data, tmp_path, epochs=10).record
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    first, last = history["held_out"][0], history["held_out"][-1]
    for layer in ("1", "2"):
        assert last["loss"][layer] < first["loss"][layer]
        assert math.isfinite(record["calibration"][layer]["slope"])
    assert len(history["steps"]) == 10 * 4  # 32 texts in batches of 8
    config = load_heads_config(tmp_path)
    assert config.exit_layers == [1, 2]
    assert config.calibration is not None
    assert set(weights_of(tmp_path)) == {1, 2}
    run = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert run["data_fingerprint"] == record["data_fingerprint"]
    assert run["versions"]["torch"]
    assert not (tmp_path / "run" / "cache").exists()
    assert not list((tmp_path / "run").glob("checkpoint*"))


@pytest.mark.parametrize("memory", [False, True])
def test_what_serves_the_heads_is_recommended(
    teacher: Teacher, data: Path, tmp_path: Path, memory: bool
) -> None:
    settings = MEMORY if memory else {}
    run = train(teacher, data, tmp_path, max_early_predictions=3, **settings)
    recommended = load_heads_config(tmp_path).recommended
    assert recommended is not None
    config = parse_config({**recommended, "heads": str(tmp_path)})
    assert config.exit_layers is not None
    assert set(config.exit_layers) <= {1, 2}
    assert (config.policy, config.max_early_predictions) == ("cost", 3)
    assert run.record["recommended"] == recommended


def test_nothing_is_recommended_without_held_out_text(
    teacher: Teacher, data: Path, tmp_path: Path
) -> None:
    train(teacher, data, tmp_path, held_out=0.0)
    config = load_heads_config(tmp_path)
    assert (config.recommended, config.calibration) == (None, None)


def test_a_model_of_the_hub_is_known_to_the_commit(
    teacher: Teacher, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(teacher, data, tmp_path / "local", epochs=1)
    assert load_heads_config(tmp_path / "local").base_model_revision is None
    # As Transformers notes it for what it fetched.
    monkeypatch.setattr(teacher.model.config, "_commit_hash", "0a1b2c", raising=False)
    train(teacher, data, tmp_path / "hub", epochs=1)
    assert load_heads_config(tmp_path / "hub").base_model_revision == "0a1b2c"


class Known:
    """States of one text, given."""

    def __init__(self, states: dict[int, torch.Tensor]) -> None:
        self.layers = list(states)
        self._states = torch.stack(list(states.values()))

    def __len__(self) -> int:
        return 1

    def states(self, indices: Any) -> torch.Tensor:
        return self._states

    def lengths(self, indices: Any) -> list[int]:
        return [self._states.shape[1] for _ in indices]


@pytest.mark.parametrize(
    ("right", "expected"), [({1}, [1]), ({3}, [3]), ({1, 2, 3}, [1]), ({2, 3}, [2])]
)
def test_the_exits_that_pay_are_recommended(
    teacher: Teacher, right: set[int], expected: list[int]
) -> None:
    """Where deeper exits add nothing they are left out, and so are those that err."""
    generator = torch.Generator().manual_seed(2)
    final, wrong = torch.randn(2, 200, teacher.hidden_size, generator=generator)
    states = {layer: final if layer in right else wrong for layer in (1, 2, 3)}
    weights = {layer: torch.eye(teacher.hidden_size) for layer in states}
    # As a fit would find it: tokens of exits that err are never accepted.
    calibration = {
        str(layer): {"slope": 1e-3, "intercept": 5.0 if layer in right else -5.0}
        for layer in states
    }
    found = recommend(
        teacher,
        HeadsTensors(weights, None, None),
        Known({**states, NUM_LAYERS: final}),
        calibration,
        drafts=1,
        max_draft_tokens=4,
    )
    assert found.options["exit_layers"] == expected
    assert found.choice.speedup > 1
    assert found.choice.acceptance == 1.0


@pytest.mark.parametrize("memory", [False, True])
def test_a_killed_run_ends_with_the_same_bits(
    teacher: Teacher, data: Path, tmp_path: Path, memory: bool
) -> None:
    options: dict[str, Any] = {"exit_layers": [0, 2], **MEMORY} if memory else {}
    train(teacher, data, tmp_path / "whole", **options)
    for kill_at in (6, 9):  # within the second and the third epoch
        with pytest.raises(Killed):
            train(teacher, data, tmp_path / "killed", kill_at=kill_at, **options)
        assert not (tmp_path / "killed" / "config.json").exists()
    record = train(teacher, data, tmp_path / "killed", **options).record
    for read in (weights_of, memory_of) if memory else (weights_of,):
        whole, resumed = read(tmp_path / "whole"), read(tmp_path / "killed")
        assert list(whole) == list(resumed) == ([0, 2] if memory else [1, 2])
        assert all(torch.equal(whole[layer], resumed[layer]) for layer in whole)
    assert record["epochs_run"] == 3
    histories = [
        (tmp_path / name / "run" / "history.json").read_text()
        for name in ("whole", "killed")
    ]
    assert histories[0] == histories[1]


def test_heads_with_memory(teacher: Teacher, data: Path, tmp_path: Path) -> None:
    settings = {**MEMORY, "start": "identity", "epochs": 10}
    record = train(teacher, data, tmp_path, exit_layers=[0, 2], **settings).record
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    first, last = history["held_out"][0], history["held_out"][-1]
    config = load_heads_config(tmp_path)
    assert config.memory
    assert config.exit_layers == [0, 2]
    for layer in ("0", "2"):
        assert last["loss"][layer] < first["loss"][layer]
        assert len(last["agreement_by_draft"][layer]) == 2
        assert last["agreement_by_draft"][layer][0] == last["agreement"][layer]
        # One map for both drafts: each text has one token less that is a second one.
        held_out = record["texts"]["held_out"]
        tokens = 2 * record["tokens"]["held_out"] - held_out
        assert record["calibration"][layer]["tokens"] == tokens
        assert memory_of(tmp_path)[int(layer)].abs().max() > 0.01
    assert "Memory" in (tmp_path / "README.md").read_text()
    report = evaluate_heads(teacher, tmp_path, [data], grid=SimulationGrid())
    for row in report["exits"]:
        assert len(row["agreement_by_draft"]) == 3
    identity = report["cost"]["transform_share"]
    plain = tmp_path / "plain"
    train(teacher, data, plain, exit_layers=[0, 2])
    report = evaluate_heads(teacher, plain, [data], grid=SimulationGrid())
    assert "agreement_by_draft" not in report["exits"][0]
    assert report["cost"]["transform_share"] == pytest.approx(identity / 2)


@pytest.mark.parametrize("memory", [False, True])
def test_least_squares_are_a_start(
    teacher: Teacher, data: Path, tmp_path: Path, memory: bool
) -> None:
    losses = {}
    for start in ("identity", "ridge"):
        settings = {"start": start, "memory": memory, "learning_rate": 1e-9}
        train(teacher, data, tmp_path / start, exit_layers=[0, 2], **settings)
        history = json.loads((tmp_path / start / "run" / "history.json").read_text())
        losses[start] = history["steps"][0]["loss"]
    for layer in ("0", "2"):
        assert losses["ridge"][layer] < losses["identity"][layer]
    weights = weights_of(tmp_path / "ridge")
    texts = load_texts([data], teacher, None)
    training, _ = split_held_out(texts, SETTINGS["held_out"], 0)
    source = LiveStates(teacher, training, [0, 2, NUM_LAYERS], 1024)
    expected = ridge_heads(source, [0, 2], memory=memory)
    for layer in (0, 2):
        weight, matrix = expected[layer]
        torch.testing.assert_close(weights[layer], weight, rtol=1e-3, atol=1e-4)
        if matrix is not None:
            found = memory_of(tmp_path / "ridge")[layer]
            torch.testing.assert_close(found, matrix, rtol=1e-3, atol=1e-4)


def test_options_of_memory_mean_nothing_without_it() -> None:
    """So that they can change while an unfinished run is continued."""
    without = TrainSettings(**SETTINGS)
    assert without.digest() == TrainSettings(**SETTINGS, unroll=7).digest()
    digests = {
        TrainSettings(**SETTINGS, memory=True, unroll=n).digest() for n in (1, 3)
    }
    assert len(digests | {without.digest()}) == 3


def test_an_unfinished_run_of_another_kind_is_not_continued(
    teacher: Teacher, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        train(teacher, data, tmp_path, kill_at=6)
    with pytest.raises(AdaDecodeError, match="unfinished run with another model"):
        train(teacher, data, tmp_path, learning_rate=1e-3)
    train(teacher, data, tmp_path, learning_rate=1e-3, overwrite=True)


def test_a_loss_that_is_not_a_number_is_told(
    teacher: Teacher, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(AdaDecodeError, match=r"--learning-rate.*not a number at step"):
        train(teacher, data, tmp_path, learning_rate=3e37)
    assert not (tmp_path / "config.json").exists()


def test_early_stopping_keeps_the_best(
    teacher: Teacher, data: Path, tmp_path: Path
) -> None:
    settings = {"epochs": 60, "patience": 2, "learning_rate": 0.2}
    record = train(teacher, data, tmp_path, **settings).record
    assert record["epochs_run"] < 60
    assert record["best_epoch"] == record["epochs_run"] - 2
    losses = [
        sum(row["loss"].values())
        for row in json.loads((tmp_path / "run" / "history.json").read_text())[
            "held_out"
        ]
    ]
    assert min(losses) == losses[record["best_epoch"] - 1]


def test_texts_that_occur_again_stay_on_one_side() -> None:
    texts = [Text((index, 7, 8), 0) for index in range(20)]
    training, held_out = split_held_out(texts, 0.25, 3)
    # Without such texts as it always was, so that unfinished runs are continued.
    drawn = torch.randperm(20, generator=torch.Generator().manual_seed(3))[:5]
    assert held_out == [texts[index] for index in sorted(drawn.tolist())]
    assert training == [text for text in texts if text not in held_out]
    # Also where another part of it is the prompt.
    again = [Text(text.token_ids, 1) for text in texts]
    both = split_held_out([*texts, *again], 0.25, 3)
    for part, before in zip(both, (training, held_out), strict=True):
        assert part[: len(before)] == before
        assert [t.token_ids for t in part[len(before) :]] == [
            t.token_ids for t in before
        ]
    assert split_held_out(texts[:1] * 4, 0.5, 0) == (texts[:1] * 4, [])


def test_automatic_exits(teacher: Teacher, data: Path, tmp_path: Path) -> None:
    choices: list[Any] = []
    record = train_heads(
        teacher,
        [data],
        None,
        TrainSettings(**SETTINGS),
        RunOptions(tmp_path, threshold=0.01),
        Accelerator(cpu=True),
        Reporter(choices=choices.extend),
    )
    assert len(choices) == 14  # all sets of up to three of the layers 0 to 3
    speedups = [choice.speedup for choice in choices]
    assert speedups == sorted(speedups, reverse=True)
    assert record["exit_layers"] == list(choices[0].exit_layers)
    assert load_heads_config(tmp_path).exit_layers == record["exit_layers"]


def test_full_size_heads_are_kept_apart(
    teacher: Teacher, data: Path, tmp_path: Path
) -> None:
    train(teacher, data, tmp_path, head="full")
    tensors = load_file(tmp_path / "run" / "full_heads.safetensors")
    # No draft vocabulary among them.
    assert sorted(tensors) == ["exit_heads.1.weight", "exit_heads.2.weight"]
    assert not (tmp_path / "config.json").exists()


def test_other_vocabulary_is_refused(teacher: Teacher, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d", [([], [1, 2, 3])], vocab_size=50)
    with pytest.raises(AdaDecodeError, match=r"vocabulary of 50, and .* has 96"):
        train(teacher, data, tmp_path / "out")


def test_nothing_to_predict_is_refused(teacher: Teacher, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d", [([], [1])], vocab_size=VOCAB_SIZE)
    with pytest.raises(AdaDecodeError, match="no text has a token to predict"):
        train(teacher, data, tmp_path / "out")


def test_evaluation_reports_what_the_heads_do(
    teacher: Teacher, data: Path, tmp_path: Path
) -> None:
    train(teacher, data, tmp_path)
    report = evaluate_heads(teacher, tmp_path, [data], grid=SimulationGrid())
    assert [row["layer"] for row in report["exits"]] == [1, 2]
    for row in report["exits"]:
        coverage = [entry["coverage"] for entry in row["thresholds"]]
        assert coverage == sorted(coverage, reverse=True)
        assert 0 <= row["agreement"] <= 1
    # Random texts are not the model's own answers, so nothing can be simulated.
    assert report["cost"]["transform_share"] > 0
    json.dumps(report)


def test_training_sees_the_draft_vocabulary_only(
    teacher: Teacher, data: Path, tmp_path: Path
) -> None:
    few = {"draft_vocabulary": 20, "batch_size": 100, "epochs": 2}
    record = train(teacher, data, tmp_path, heads_dtype="bfloat16", **few).record
    config = load_heads_config(tmp_path)
    assert {w.dtype for w in weights_of(tmp_path).values()} == {torch.bfloat16}
    token_ids = load_tensors(tmp_path, config).draft_token_ids
    assert token_ids is not None
    assert config.default_draft_vocabulary == len(token_ids) == 20
    # So its agreement is among these, which is told with it.
    assert record["held_out"]["draft_vocabulary"] == 20
    assert "top token among the 20 tokens of" in (tmp_path / "README.md").read_text()
    # The first step is of T = I on all texts: the divergence among these tokens.
    texts = load_texts([data], teacher, None)
    training, _ = split_held_out(texts, record["settings"]["held_out"], 0)
    states = LiveStates(teacher, training, [1, 2, NUM_LAYERS], 1024).states(
        range(len(training))
    )
    logits = states[[2, 0, 1]] @ teacher.lm_head[token_ids].T
    target, *exits = logits.log_softmax(-1)
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    for layer, log_probs in zip(("1", "2"), exits, strict=True):
        loss = (target.exp() * (target - log_probs)).sum(-1).mean()
        assert history["steps"][0]["loss"][layer] == pytest.approx(
            loss.item(), rel=1e-2
        )


def test_exits_are_measured_on_the_tokens_that_gates_look_at(
    teacher: Teacher, data: Path
) -> None:
    texts = load_texts([data], teacher, None)
    source = LiveStates(teacher, texts, [1, NUM_LAYERS], 1024)
    states = source.states(range(len(texts)))
    weights = {1: torch.eye(states.shape[-1])}
    token_ids = torch.tensor([5, 90, 17, 3])
    everything = measure(weights, source, teacher.lm_head)[1]
    found = measure(weights, source, teacher.lm_head, draft_token_ids=token_ids)[1]
    logits = states[0] @ teacher.lm_head[token_ids].T
    top = token_ids[logits.argmax(-1)]
    assert found.token.tolist() == top.tolist()
    final = (states[-1] @ teacher.lm_head.T).argmax(-1)
    assert found.agreed.tolist() == (top == final).tolist()
    probability = logits.softmax(-1).max(-1).values.numpy()
    assert found.probability == pytest.approx(probability, rel=1e-4)
    assert found.kl == pytest.approx(everything.kl)
