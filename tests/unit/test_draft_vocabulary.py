# SPDX-License-Identifier: Apache-2.0
"""The draft vocabulary: its format, its refusals and its row on the card."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads import load_heads_config, load_tensors, save_heads
from adadecode_vllm.toolkit.publishing.card import name_draft_vocabulary, render_card
from adadecode_vllm.toolkit.publishing.save import save_pretrained
from adadecode_vllm.toolkit.publishing.upload import push_to_hub
from tests.fake_hub import FakeApi
from tests.published_heads import DRAFT_VOCABULARY_ROW as ROW
from tests.published_heads import make_config, make_weights

IDS = [7, 31, 0, 12]


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    directory = tmp_path / "heads"
    save_pretrained(
        directory, make_weights(), make_config(), draft_token_ids=torch.tensor(IDS)
    )
    return directory


def edit(directory: Path, token_ids: torch.Tensor | None, **config: Any) -> None:
    """Replace or (None) remove the tensor, and change keys of the configuration."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    del tensors["draft_token_ids"]
    if token_ids is not None:
        tensors["draft_token_ids"] = token_ids
    save_file(tensors, path)
    path = directory / "config.json"
    values = json.loads(path.read_text()) | config
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


# The format


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("named", [None, 4])
def test_round_trip(tmp_path: Path, dtype: Any, named: int | None) -> None:
    config = make_config(dtype=dtype, draft_vocabulary=named)
    save_heads(tmp_path, make_weights(), config, torch.tensor(IDS))
    loaded = load_heads_config(tmp_path)
    assert loaded == make_config(dtype=dtype, draft_vocabulary=4)
    token_ids = load_tensors(tmp_path, loaded).draft_token_ids
    assert token_ids is not None
    assert token_ids.dtype == torch.int64
    assert token_ids.tolist() == IDS
    weights = load_tensors(tmp_path, loaded).weights
    for layer, weight in make_weights().items():
        assert torch.equal(weights[layer], weight.to(getattr(torch, dtype)))
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_absent_stays_absent(tmp_path: Path) -> None:
    save_heads(tmp_path, make_weights(), make_config())
    config = load_heads_config(tmp_path)
    assert config.draft_vocabulary is None
    assert load_tensors(tmp_path, config).draft_token_ids is None
    assert set(json.loads((tmp_path / "config.json").read_text())) == {
        "model_type",
        "exit_layers",
        "hidden_size",
        "vocab_size",
        "num_hidden_layers",
        "base_model",
        "lm_head_fingerprint",
        "library_version",
        "dtype",
    }
    assert "Draft vocabulary" not in render_card(config, "heads")


def test_saving_again_without_it_removes_it(heads: Path) -> None:
    save_heads(heads, make_weights(), make_config())
    assert load_tensors(heads, load_heads_config(heads)).draft_token_ids is None


@pytest.mark.parametrize(
    ("token_ids", "named", "message"),
    [
        (torch.tensor([1, 32]), None, "holds 32, but the vocabulary has the ids 0 to"),
        (torch.tensor([1, -1]), None, "holds -1, but"),
        (torch.tensor([1, 5, 1]), None, "holds 1 more than once"),
        (torch.tensor([1, 5]), 3, r"has shape \(2,\) instead of \(3,\)"),
        (torch.tensor([[1], [5]]), 2, r"has shape \(2, 1\) instead of"),
        (torch.tensor([], dtype=torch.int64), None, r"has shape \(0,\) instead of"),
        (torch.tensor([1, 5], dtype=torch.int32), 2, "has dtype torch.int32 instead"),
        (torch.tensor([1.0, 5.0]), 2, "has dtype torch.float32 instead"),
        (None, 3, "draft_vocabulary is 3, but there are no draft_token_ids"),
    ],
)
def test_saving_refuses_what_does_not_fit(
    tmp_path: Path, token_ids: torch.Tensor | None, named: int | None, message: str
) -> None:
    config = make_config(draft_vocabulary=named)
    for save in (
        lambda: save_heads(tmp_path / "h", make_weights(), config, token_ids),
        lambda: save_pretrained(
            tmp_path / "h", make_weights(), config, draft_token_ids=token_ids
        ),
    ):
        with pytest.raises(ValueError, match=message):
            save()
    assert not (tmp_path / "h").exists()


def refusal(heads: Path, read: Callable[[Path], object]) -> str:
    """Return the sentence that reading the heads ends with."""
    with pytest.raises(AdaDecodeError) as caught:
        read(heads)
    text = str(caught.value)
    assert text.startswith(f"--adadecode-heads {heads}: ")
    assert "\n" not in text
    assert "; " in text  # the remedy
    return text


@pytest.mark.parametrize(
    ("token_ids", "config", "message"),
    [
        (None, {}, "model.safetensors lacks draft_token_ids"),
        (
            torch.tensor(IDS),
            {"draft_vocabulary": None},
            "model.safetensors holds the unexpected draft_token_ids",
        ),
        (
            torch.tensor(IDS[:3]),
            {},
            "draft_token_ids has shape (3,) instead of (4,)",
        ),
        (
            torch.tensor([IDS]),
            {},
            "draft_token_ids has shape (1, 4) instead of (4,)",
        ),
        (
            torch.tensor(IDS, dtype=torch.int32),
            {},
            "draft_token_ids has dtype I32 instead of I64",
        ),
        (
            torch.zeros(33, dtype=torch.int64),
            {"draft_vocabulary": 33},
            "config.json is invalid: draft_vocabulary is 33, but the vocabulary has "
            "only 32 tokens",
        ),
        (torch.tensor(IDS), {"draft_vocabulary": 0}, "invalid: draft_vocabulary: "),
        (torch.tensor(IDS), {"draft_vocabulary": "4"}, "invalid: draft_vocabulary: "),
    ],
)
def test_headers_that_disagree_are_refused(
    heads: Path, token_ids: torch.Tensor | None, config: dict[str, Any], message: str
) -> None:
    edit(heads, token_ids, **config)
    assert message in refusal(heads, load_heads_config)


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ([7, 31, 0, 32], "draft_token_ids holds 32, but the vocabulary has the ids 0"),
        ([7, -3, 0, 12], "draft_token_ids holds -3, but the vocabulary has the ids 0"),
        ([7, 31, 0, 31], "draft_token_ids holds 31 more than once"),
    ],
)
def test_ids_that_cannot_be_used_are_refused(
    heads: Path, token_ids: list[int], message: str
) -> None:
    edit(heads, torch.tensor(token_ids))
    config = load_heads_config(heads)
    assert message in refusal(heads, lambda d: load_tensors(d, config).draft_token_ids)


def test_a_file_changed_since_its_header_was_checked_is_refused(heads: Path) -> None:
    config = load_heads_config(heads)
    edit(heads, torch.tensor([1, 2]))
    assert "has shape (2,) instead of (4,)" in refusal(
        heads, lambda d: load_tensors(d, config).draft_token_ids
    )
    edit(heads, None)
    assert "model.safetensors" in refusal(
        heads, lambda d: load_tensors(d, config).draft_token_ids
    )


# The card and the Hub


def test_the_card_names_it(heads: Path) -> None:
    card = (heads / "README.md").read_text()
    assert card.count(ROW) == 1
    assert card == render_card(load_heads_config(heads), str(heads))


def test_a_card_is_told_of_another_one() -> None:
    without = render_card(make_config(), "heads")
    with_it = render_card(make_config(draft_vocabulary=4), "heads")
    other = render_card(make_config(draft_vocabulary=5), "heads")
    assert name_draft_vocabulary(without, make_config(draft_vocabulary=4)) == with_it
    assert name_draft_vocabulary(with_it, make_config(draft_vocabulary=4)) == with_it
    assert name_draft_vocabulary(with_it, make_config(draft_vocabulary=5)) == other
    assert name_draft_vocabulary(with_it, make_config()) == without
    assert name_draft_vocabulary("Mine\n", make_config(draft_vocabulary=4)) == "Mine\n"


def test_pushing_carries_it(heads: Path, api: type[FakeApi]) -> None:
    push_to_hub(heads, "ann/heads")
    pushed = api.made[0].files
    copy = heads.parent / "copy"
    copy.mkdir()
    for name, content in pushed.items():
        (copy / name).write_bytes(content)
    token_ids = load_tensors(copy, load_heads_config(copy)).draft_token_ids
    assert token_ids is not None
    assert token_ids.tolist() == IDS
    assert ROW in pushed["README.md"].decode()
