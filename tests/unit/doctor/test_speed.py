# SPDX-License-Identifier: Apache-2.0
"""`adadecode doctor`: the speed that evaluation, training and card tell of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adadecode_vllm.heads import (
    init_heads,
    load_heads_config,
    load_tensors,
    save_heads,
)
from adadecode_vllm.heads.files import weights_digest
from adadecode_vllm.toolkit.doctor.examine import examine
from adadecode_vllm.toolkit.doctor.finding import Finding
from adadecode_vllm.toolkit.evaluation.output import write_evaluation
from adadecode_vllm.toolkit.publishing.card import render_card
from adadecode_vllm.toolkit.publishing.card_reading import predicted_best
from tests.evaluations import make_evaluation
from tests.findings import by_check, damage
from tests.published_heads import make_config


def speed(heads: Path) -> Finding:
    return by_check(examine(None, str(heads)))["speed"]


def evaluate(heads: Path, **best: Any) -> None:
    evaluation = make_evaluation()
    evaluation["exits"] = [
        {**exit_, "layer": layer}
        for exit_, layer in zip(evaluation["exits"], (1, 3), strict=False)
    ]
    evaluation["weights"] = weights_digest(heads)
    evaluation["best"] = {"threshold": 0.6, "cap": 4, "speedup": 1.5} | best
    write_evaluation(heads / "evaluation", evaluation)


def test_the_evaluation_tells_the_speed(heads: Path) -> None:
    evaluate(heads)
    finding = speed(heads)
    assert finding.status == "ok"
    assert "1.50x with threshold 0.6 and cap 4, predicted" in finding.text
    assert '{"threshold": 0.6, "max_early_predictions": 4}' in finding.remedy
    assert finding.figures["source"] == "evaluation/evaluation.json"
    damage(heads, "evaluation/evaluation.json", simulation=None)
    assert '"gate"' not in speed(heads).remedy
    simulation = {**make_evaluation()["simulation"], "gate": "acceptance"}
    damage(heads, "evaluation/evaluation.json", simulation=simulation)
    assert '"gate": "acceptance"' in speed(heads).remedy


def test_no_speedup_is_a_warning(heads: Path) -> None:
    evaluate(heads, speedup=0.97)
    damage(heads, "evaluation/evaluation.json", defaults=None)
    finding = speed(heads)
    assert finding.status == "warning"
    assert "No setting is predicted to be faster" in finding.text


def test_the_defaults_are_told_where_nothing_is_faster(heads: Path) -> None:
    evaluate(heads, speedup=1.3)
    finding = speed(heads)
    assert (finding.status, finding.figures["speedup"]) == ("ok", 1.4123)
    assert "With the engine's defaults 1.41x" in finding.text
    assert "without further options" in finding.remedy
    defaults = make_evaluation()["defaults"] | {"speedup": 1.0}
    damage(heads, "evaluation/evaluation.json", best=None, defaults=defaults)
    finding = speed(heads)
    assert finding.status == "warning"
    assert "the engine's defaults reach 1.00x" in finding.text


def test_the_evaluation_of_former_heads_says_nothing(heads: Path) -> None:
    """The directory's report stays where heads are trained anew."""
    evaluate(heads)
    config = load_heads_config(heads)
    weights = load_tensors(heads, config).weights
    save_heads(heads, {layer: 2 * weight for layer, weight in weights.items()}, config)
    assert speed(heads).text == "Unknown: these heads were not evaluated."


def test_the_training_tells_agreement_only(heads: Path) -> None:
    (heads / "run").mkdir()
    held_out = {"epoch": 2, "loss": {"1": 0.5}, "agreement": {"1": 0.5, "3": 0.75}}
    (heads / "run" / "history.json").write_text(
        json.dumps({"steps": [], "held_out": [held_out]})
    )
    finding = speed(heads)
    assert (finding.status, finding.figures["speedup"]) == ("warning", None)
    assert "50.0 % after layer 1, 75.0 % after layer 3" in finding.text
    assert "adadecode eval" in finding.remedy


def test_agreement_is_that_of_the_epoch_that_was_kept(heads: Path) -> None:
    (heads / "run").mkdir()
    held_out = [
        {
            "epoch": epoch,
            "loss": {"1": loss, "3": 0.1},
            "agreement": {"1": loss, "3": 0.75},
            "draft_vocabulary": 4096,
        }
        for epoch, loss in ((1, 0.5), (2, 0.25), (3, 0.3))
    ]
    (heads / "run" / "history.json").write_text(
        json.dumps({"steps": [], "held_out": held_out})
    )
    among = "among the 4,096 tokens of the draft vocabulary"
    expected = f"25.0 % after layer 1, 75.0 % after layer 3 {among}."
    assert expected in speed(heads).text


def test_heads_that_recommend_something_are_served_by_their_name(heads: Path) -> None:
    damage(heads, "config.json", recommended={"exit_layers": [1]})
    evaluate(heads, speedup=1.3)
    assert f"vllm serve {heads} --plugin adadecode" in speed(heads).remedy
    # Another setting was found with all exits, which only the model's name brings.
    evaluate(heads, speedup=1.5)
    remedy = speed(heads).remedy
    assert f"--adadecode-heads {heads} and --adadecode-config '" in remedy
    damage(heads, "config.json", recommended=None)
    assert "--adadecode-heads" not in speed(heads).remedy


def test_requests_and_rows_of_the_grid_are_told(heads: Path) -> None:
    evaluate(heads)
    assert "at a time, where rows cost nothing, on text like" in speed(heads).text
    conditions = {"requests": 8, "row_costs": {"1": 1.0, "72": 3.456}}
    simulation = {**make_evaluation()["simulation"], **conditions}
    damage(heads, "evaluation/evaluation.json", simulation=simulation)
    finding = speed(heads)
    assert "8 requests at a time, where 72 rows cost 3.46 times one" in finding.text
    assert "it is unknown" not in finding.text
    assert finding.figures["batch_sizes"] == [8]


def test_untrained_heads(model: Path, tmp_path: Path) -> None:
    init_heads(str(model), tmp_path / "heads", [1, 3])
    finding = speed(tmp_path / "heads")
    assert "no exit is trained (T = I)" in finding.text
    memory = by_check(examine(str(model), str(tmp_path / "heads")))["memory"]
    assert memory.figures["heads_bytes"] == 0


def test_a_card_tells_what_it_predicts() -> None:
    evaluation = make_evaluation()
    card = render_card(make_config(), "heads", evaluation=evaluation)
    best = predicted_best(card)
    assert best is not None
    written = evaluation["best"]
    assert best.speedup == pytest.approx(written["speedup"], abs=0.005)
    assert (best.threshold, best.cap) == (written["threshold"], written["cap"])
    assert predicted_best(render_card(make_config(), "heads")) is None
