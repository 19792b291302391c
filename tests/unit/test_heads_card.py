# SPDX-License-Identifier: Apache-2.0
"""The local directory of heads and their card."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads import load_heads_config, load_tensors
from adadecode_vllm.heads.hub import is_hub_id
from adadecode_vllm.toolkit.publishing.card import (
    name_repository,
    render_card,
    write_card,
)
from adadecode_vllm.toolkit.publishing.card_reading import predicted_best
from adadecode_vllm.toolkit.publishing.save import (
    make_speculators_config,
    save_pretrained,
)
from tests.evaluations import make_evaluation
from tests.published_heads import (
    BASE,
    FILES,
    TRAINING,
    D,
    argument,
    make_config,
    make_weights,
    serve_words,
)

# save_pretrained


def test_save_pretrained(heads: Path) -> None:
    config = load_heads_config(heads)
    assert sorted(os.listdir(heads)) == FILES
    assert config == make_config(speculators_config=make_speculators_config(BASE))
    weights = load_tensors(heads, config).weights
    for layer, weight in make_weights().items():
        assert torch.equal(weights[layer], weight)


def test_speculators_config(tmp_path: Path) -> None:
    written = save_pretrained(
        tmp_path, make_weights(), make_config(), architectures=["LlamaForCausalLM"]
    )
    on_disk = json.loads((tmp_path / "config.json").read_text())["speculators_config"]
    assert on_disk == written.speculators_config
    assert on_disk == {
        "algorithm": "adadecode",
        "proposal_methods": [
            {
                "proposal_type": "greedy",
                "speculative_tokens": 8,
                "verifier_accept_k": 1,
                "accept_tolerance": 0.0,
            }
        ],
        "default_proposal_method": "greedy",
        "verifier": {"name_or_path": BASE, "architectures": ["LlamaForCausalLM"]},
    }


def test_speculators_config_is_kept(tmp_path: Path) -> None:
    block = make_speculators_config("other", ["A"], speculative_tokens=2)
    save_pretrained(tmp_path, make_weights(), make_config(speculators_config=block))
    assert load_heads_config(tmp_path).speculators_config == block


def test_heads_without_speculators_config_still_load(heads: Path) -> None:
    values = json.loads((heads / "config.json").read_text())
    del values["speculators_config"]
    (heads / "config.json").write_text(json.dumps(values))
    assert load_heads_config(heads).speculators_config is None


@pytest.mark.parametrize(
    ("weights", "evaluation", "error"),
    [
        (make_weights(), {"model": "m"}, AdaDecodeError),
        ({1: torch.eye(D)}, None, ValueError),
    ],
    ids=["evaluation", "weights"],
)
def test_failed_save_keeps_what_was_there(
    heads: Path, weights: Any, evaluation: Any, error: type[Exception]
) -> None:
    before = {name: (heads / name).read_bytes() for name in FILES}
    with pytest.raises(error):
        save_pretrained(
            heads, weights, make_config(base_model="new"), evaluation=evaluation
        )
    assert {name: (heads / name).read_bytes() for name in os.listdir(heads)} == before


# The card


def test_card_metadata(heads: Path) -> None:
    data = ModelCard.load(heads / "README.md").data.to_dict()
    assert data == {
        "base_model": BASE,
        "base_model_relation": "adapter",
        "datasets": ["openai/gsm8k"],
        "library_name": "adadecode-vllm",
        "license": "llama3.1",
        "tags": ["adadecode", "vllm", "speculative-decoding", "early-exit"],
    }


@pytest.mark.parametrize("base_model", ["examples/demo/model", "/models/x", "model"])
def test_a_local_base_model_is_not_metadata(base_model: str) -> None:
    card = ModelCard(render_card(make_config(base_model=base_model), "heads"))
    assert set(card.data.to_dict()) == {"library_name", "tags"}
    assert f"Exit heads for {base_model}" in card.text


def test_card_of_unknown_training() -> None:
    card = render_card(make_config(), "heads")
    assert "How these heads were made was not recorded." in card
    assert "## Figures" not in card
    assert serve_words(card) == [
        *("vllm", "serve", BASE, "--plugin", "adadecode"),
        *("--adadecode-heads", "heads"),
    ]


RECOMMENDED = {"exit_layers": [3], "max_early_predictions": 4}


def test_card_serves_heads_that_recommend_something_by_their_name() -> None:
    """Only so an engine follows it; the other command says the same by options."""
    card = render_card(make_config(recommended=RECOMMENDED), "my heads")
    assert serve_words(card) == ["vllm", "serve", "my heads", "--plugin", "adadecode"]
    named = serve_words(card[card.index("the model\nis named") :])
    assert named[:3] == ["vllm", "serve", BASE]
    assert argument(named, "--adadecode-heads") == "my heads"
    assert json.loads(argument(named, "--adadecode-config")) == RECOMMENDED


def test_card_names_the_model_where_another_setting_is_faster() -> None:
    config = make_config(recommended=RECOMMENDED)
    evaluation = make_evaluation()  # with all exits
    card = render_card(config, "heads", evaluation=evaluation)
    words = serve_words(card)
    assert words[2] == BASE
    options = json.loads(argument(words, "--adadecode-config"))
    assert options == {"threshold": 0.6, "max_early_predictions": 8}
    assert "`vllm serve heads --plugin adadecode` serves with what" in card
    evaluation["defaults"]["speedup"] = 1.75
    card = render_card(config, "heads", evaluation=evaluation)
    assert serve_words(card)[2] == "heads"
    assert "Predicted speedup with the engine's defaults: 1.75x." in card


def test_card_of_registered_heads_names_the_model_only() -> None:
    card = render_card(make_config(recommended=RECOMMENDED), None)
    assert serve_words(card) == ["vllm", "serve", BASE, "--plugin", "adadecode"]
    assert card.count("vllm serve") == 1


def test_card_names_a_repository_in_both_commands() -> None:
    config = make_config(recommended=RECOMMENDED)
    for heads in ("heads", "my heads", "o'brien's heads"):
        card = name_repository(render_card(config, heads), "ann/heads")
        assert card == render_card(config, "ann/heads")


def test_a_later_evaluation_keeps_what_the_card_says_of_the_training(
    tmp_path: Path,
) -> None:
    """Heads of the Hub come without the record of their training."""
    config, evaluation = make_config(), make_evaluation()
    first = write_card(tmp_path, config, training=TRAINING).read_text()
    second = write_card(tmp_path, config, evaluation=evaluation).read_text()
    recorded = render_card(
        config, str(tmp_path), training=TRAINING, evaluation=evaluation
    )
    assert second == recorded != first
    assert write_card(tmp_path, config, evaluation=evaluation).read_text() == recorded


def test_serve_command_survives_any_path() -> None:
    card = render_card(make_config(base_model="my models/it's"), "/tmp/a b/$HOME")
    words = serve_words(card)
    assert words[2] == "my models/it's"
    assert argument(words, "--adadecode-heads") == "/tmp/a b/$HOME"


def test_card_with_figures() -> None:
    card = render_card(make_config(), "heads", evaluation=make_evaluation())
    options = json.loads(argument(serve_words(card), "--adadecode-config"))
    assert options == {"threshold": 0.6, "max_early_predictions": 8}
    assert "Predicted speedup with this setting: 1.52x." in card
    assert "On 13,047 held-out tokens (held-out)" in card
    assert "| 4 | 90.3 % | 0.123 | 0.6 | 63.2 % | 92.0 % |" in card
    # What an earlier version did not say, its grid assumed.
    assert "one request at a time, where rows cost nothing;\nthe LM head takes" in card
    assert "LM head takes 7.1 % of a plain step" in card


def test_card_tells_what_rows_cost() -> None:
    evaluation = make_evaluation()
    conditions = {"requests": 8, "row_costs": {"1": 1.0, "72": 3.456}}
    evaluation["simulation"] |= conditions
    card = render_card(make_config(), "heads", evaluation=evaluation)
    assert "8 requests at a time, where 72 rows cost 3.46 times one;" in card
    assert predicted_best(card) is not None


def test_card_counts_parameters() -> None:
    assert f"| Parameters | {2 * D**2} in float32 |" in render_card(make_config(), "h")
    card = render_card(make_config(memory=True), "h")
    assert "| Memory | of the token before |\n" in card
    assert f"| Parameters | {4 * D**2} in float32 |" in card


def test_card_text_is_no_template() -> None:
    config = make_config(base_model="{{ 7 * 7 }}")
    card = render_card(config, "{% raw %}", training={"note": "{{ config }}"})
    assert "# Exit heads for {{ 7 * 7 }}\n" in card
    assert "--adadecode-heads '{% raw %}'\n" in card
    assert "| note | {{ config }} |" in card


def test_card_names_the_other_gate() -> None:
    evaluation = make_evaluation()
    evaluation["simulation"]["gate"] = "acceptance"
    words = serve_words(render_card(make_config(), "heads", evaluation=evaluation))
    assert json.loads(argument(words, "--adadecode-config"))["gate"] == "acceptance"


def test_card_recommends_nothing_that_is_slower() -> None:
    evaluation = make_evaluation(
        best={"threshold": 0.9, "cap": 1, "speedup": 0.97}, defaults=None
    )
    card = render_card(make_config(), "heads", evaluation=evaluation)
    assert "--adadecode-config" not in card
    assert "No setting is predicted to be faster" in card


def test_card_sets_no_option_where_the_defaults_are_fastest() -> None:
    evaluation = make_evaluation()
    card = render_card(make_config(), "heads", evaluation=evaluation)
    assert "With the engine's defaults 1.41x over plain decoding" in card
    evaluation["defaults"]["speedup"] = 1.75
    card = render_card(make_config(), "heads", evaluation=evaluation)
    assert "--adadecode-config" not in card
    assert "Predicted speedup with the engine's defaults: 1.75x." in card


def test_card_of_training(heads: Path) -> None:
    text = (heads / "README.md").read_text()
    assert "| settings.objective | kl |" in text
    assert "| settings.epochs | 100 |" in text
    assert "max_length" not in text
    assert "calibration" not in text
    assert "| 1 | 0.457 | 81.2 % |" in text
    assert f"```sh\nadadecode train {BASE} --data gsm\n```" in text
    assert "| data.url | https://example.org/a/b |" in text
    assert "| note | a \\| b &lt;b>bold&lt;/b> |" in text


def test_card_tells_nothing_of_the_machine(heads: Path) -> None:
    text = (heads / "README.md").read_text()
    body = text.replace(str(heads), "")  # the serve command names the directory
    assert "/data/" not in body
    assert "/home/" not in body
    assert "| data.path | gsm8k |" in text


def test_card_cuts_each_path_of_a_list() -> None:
    training = {"data": ["/data/x y/gsm", "/data/runs/mbpp", "local/xsum"]}
    evaluation = make_evaluation(data="/data/runs/problems, /data/runs/code")
    card = render_card(make_config(), "h", training=training, evaluation=evaluation)
    assert "| data | gsm, mbpp, local/xsum |" in card
    assert "held-out tokens (problems, code)" in card
    assert "/data/" not in card


@pytest.mark.parametrize(
    ("training", "among"),
    [
        ({}, None),
        ({"held_out": {"draft_vocabulary": 1234}}, 1234),
    ],
)
def test_card_tells_among_which_tokens_agreement_was(
    training: dict[str, Any], among: int | None
) -> None:
    held_out = {**TRAINING["held_out"], **training.get("held_out", {})}
    card = render_card(
        make_config(draft_vocabulary=20),
        "heads",
        training={**training, "held_out": held_out},
    )
    words = "held out of the training;\nagreement is with the final layer's top token "
    if among is None:
        assert "On text held out of the training:\n" in card
    else:
        assert f"{words}among the {among:,} tokens of the draft vocabulary:\n" in card


def test_write_card(heads: Path) -> None:
    path = write_card(heads, make_config(), repo_id="ann/heads")
    assert path == heads / "README.md"
    words = serve_words(path.read_text())
    assert argument(words, "--adadecode-heads") == "ann/heads"
    assert sorted(os.listdir(heads)) == FILES


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (BASE, True),
        ("ann/heads_1.0", True),
        ("gpt2", False),
        ("examples/demo/model", False),
        ("/models/heads", False),
        ("/heads", False),
        ("./heads", False),
        ("../heads", False),
        ("~/heads", False),
        ("heads/", False),
        ("my heads/x", False),
        ("", False),
    ],
)
def test_is_hub_id(name: str, expected: bool) -> None:
    assert is_hub_id(name) is expected


def test_a_card_of_ones_own_is_set_aside(heads: Path) -> None:
    """Neither an edited card nor somebody's README.md is lost."""
    config = load_heads_config(heads)
    path = heads / "README.md"
    written = path.read_text()
    write_card(heads, config)  # as it was written: replaced
    assert not (heads / "README.md.old").exists()
    for number, text in enumerate(("Mine\n", written.replace("Heads", "My heads"))):
        path.write_text(text)
        write_card(heads, config)
        old = heads / f"README.md.old{number + 1 if number else ''}"
        assert old.read_text() == text
        assert path.read_text() == render_card(config, str(heads))
    path.write_text("Again\n")
    save_pretrained(heads, make_weights(), config)
    assert (heads / "README.md.old3").read_text() == "Again\n"
