# SPDX-License-Identifier: Apache-2.0
"""Sharing heads: downloads and uploads.

Downloads run huggingface_hub itself against a local server; uploads stop at its
`HfApi`.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard

from adadecode_vllm import __version__
from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads import load_heads_config, load_tensors
from adadecode_vllm.heads.hub import (
    from_pretrained,
    pin_heads,
    resolve_heads,
)
from adadecode_vllm.toolkit.publishing.save import save_pretrained
from adadecode_vllm.toolkit.publishing.upload import push_to_hub
from tests.fake_hub import FakeApi, Hub, publish, serve_hub, use_cache
from tests.published_heads import (
    BASE,
    FILES,
    argument,
    make_config,
    make_weights,
    serve_words,
)

# Downloads


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub(monkeypatch) as hub:
        use_cache(monkeypatch, tmp_path / "cache")
        yield hub


def refusal(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(AdaDecodeError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert "; " in message  # the remedy
    return message


def test_download(hub: Hub, heads: Path) -> None:
    publish(hub, heads, pytorch_model__bin=b"pickle", notes__txt=b"notes")
    directory = from_pretrained("ann/heads")
    assert sorted(os.listdir(directory)) == FILES
    assert hub.fetched() == FILES
    config = load_heads_config(directory)
    assert config == load_heads_config(heads)
    assert torch.equal(load_tensors(directory, config).weights[3], make_weights()[3])


def test_second_download_fetches_nothing(hub: Hub, heads: Path) -> None:
    publish(hub, heads)
    first = from_pretrained("ann/heads")
    hub.requests.clear()
    assert from_pretrained("ann/heads") == first
    assert hub.fetched() == []
    hub.repositories.clear()
    assert from_pretrained("ann/heads", local_files_only=True) == first


def test_revision(hub: Hub, heads: Path) -> None:
    publish(hub, heads)
    assert from_pretrained("ann/heads", revision="v1").name == "2" * 40
    assert resolve_heads("ann/heads@v1").name == "2" * 40
    assert resolve_heads("ann/heads").name == "1" * 40


def test_a_model_is_refused_before_its_weights_are_fetched(
    hub: Hub, heads: Path
) -> None:
    publish(hub, heads, config__json=b'{"model_type": "llama"}')
    message = refusal(from_pretrained, "ann/heads")
    assert message == (
        "--adadecode-heads ann/heads: the repository has model_type 'llama' instead of "
        "model_type 'adadecode'; name a repository of exit heads, not of a model"
    )
    assert hub.fetched() == ["config.json"]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"config__json": None}, "the repository has no config.json"),
        ({"config__json": b"{"}, "config.json of the repository is not JSON"),
        ({"config__json": b"[]"}, "the repository has model_type None"),
        (
            {"model__safetensors": None, "pytorch_model__bin": b"x"},
            "the repository holds no model.safetensors, and only safetensors are",
        ),
    ],
)
def test_repositories_without_heads(
    hub: Hub, heads: Path, files: dict[str, Any], reason: str
) -> None:
    publish(hub, heads, **files)
    message = refusal(from_pretrained, "ann/heads")
    assert message.startswith(f"--adadecode-heads ann/heads: {reason}")


def test_a_card_is_not_needed(hub: Hub, heads: Path) -> None:
    publish(hub, heads, README__md=None)
    assert load_heads_config(from_pretrained("ann/heads")).exit_layers == [1, 3]


def test_unknown_repository(hub: Hub) -> None:
    message = refusal(resolve_heads, "ann/heds")
    assert message.startswith(
        "--adadecode-heads ann/heds: neither a local directory nor a repository"
    )


def test_unknown_revision(hub: Hub, heads: Path) -> None:
    publish(hub, heads)
    message = refusal(resolve_heads, "ann/heads@v2")
    assert "the repository has no revision 'v2'" in message


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (403, "GatedRepo", "the repository is gated"),
        (401, None, "log in with `hf auth login`"),
        (418, None, "does not answer (Client error '418"),
    ],
)
def test_refused_by_the_hub(
    hub: Hub, status: int, code: str | None, reason: str
) -> None:
    hub.refuse = (status, code)
    assert reason in refusal(from_pretrained, "ann/heads")


def test_no_connection(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = "http://127.0.0.1:9"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", closed)
    message = refusal(from_pretrained, "ann/heads")
    assert "the Hugging Face Hub does not answer (" in message


def test_never_downloaded(hub: Hub) -> None:
    message = refusal(from_pretrained, "ann/heads", local_files_only=True)
    assert "nor downloaded before, and the Hugging Face Hub was not asked" in message
    assert hub.requests == []


def test_a_directory_wins(
    hub: Hub, heads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(heads.parent)
    (heads.parent / "ann").mkdir()
    heads.rename(heads.parent / "ann" / "heads")
    assert resolve_heads("ann/heads") == Path("ann/heads")
    assert resolve_heads(Path("ann/heads")) == Path("ann/heads")
    (heads.parent / "ann" / "heads").rename(heads.parent / "ann" / "heads@v1")
    assert resolve_heads("ann/heads@v1") == Path("ann/heads@v1")
    assert hub.requests == []


def test_a_revision_is_the_hubs(
    hub: Hub, heads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever directory has the name without it."""
    publish(hub, heads)
    monkeypatch.chdir(heads.parent)
    (heads.parent / "ann").mkdir()
    heads.rename(heads.parent / "ann" / "heads")
    assert resolve_heads("ann/heads@v1").name == "2" * 40


def test_another_machine_finds_the_same_commit(
    hub: Hub, heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a cache of its own, though the branch has moved on meanwhile."""
    publish(hub, heads)
    name, directory = pin_heads("ann/heads")
    assert name == "ann/heads@" + "1" * 40
    assert directory.is_relative_to(tmp_path / "cache")
    assert pin_heads("ann/heads@main") == (name, directory)
    assert pin_heads(name) == (name, directory)
    hub.revisions |= {"before": "1" * 40, "main": "3" * 40}
    use_cache(monkeypatch, tmp_path / "elsewhere")
    found = resolve_heads(name)
    assert found.name == "1" * 40
    assert found.is_relative_to(tmp_path / "elsewhere")
    assert load_heads_config(found) == load_heads_config(directory)
    assert pin_heads("ann/heads")[0] == "ann/heads@" + "3" * 40


def test_a_directory_stays_one_wherever_a_worker_runs(
    hub: Hub, heads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(heads.parent)
    (heads.parent / "ann").mkdir()
    heads.rename(heads.parent / "ann" / "heads")
    name, directory = pin_heads("ann/heads")
    assert directory == Path("ann/heads")
    monkeypatch.chdir("/")
    assert resolve_heads(name) == heads.parent / "ann" / "heads"
    assert hub.requests == []


@pytest.mark.parametrize("path", ["heads", "./heads", "/no/such/heads", "a/b/c"])
def test_missing_paths_are_not_looked_up(hub: Hub, path: str) -> None:
    message = refusal(resolve_heads, path)
    assert f"--adadecode-heads {Path(path)}: the path does not exist" in message
    assert hub.requests == []


# Uploads


def test_push(api: type[FakeApi], heads: Path) -> None:
    before = {name: (heads / name).read_bytes() for name in FILES}
    assert push_to_hub(heads, "ann/heads", token="t") == "https://hub/commit/1"
    [made] = api.made
    assert made.values == {
        "token": "t",
        "library_name": "adadecode-vllm",
        "library_version": __version__,
    }
    assert made.created == {"repo_id": "ann/heads", "private": False, "exist_ok": True}
    assert made.commit == {
        "repo_id": "ann/heads",
        "commit_message": "Upload exit heads",
        "revision": None,
        "create_pr": False,
    }
    assert sorted(made.files) == FILES
    assert made.files["model.safetensors"] == before["model.safetensors"]
    assert made.files["config.json"] == before["config.json"]
    assert {name: (heads / name).read_bytes() for name in os.listdir(heads)} == before


def test_published_card_names_the_repository(api: type[FakeApi], heads: Path) -> None:
    push_to_hub(heads, "ann/heads")
    card = api.made[0].files["README.md"].decode()
    assert argument(serve_words(card), "--adadecode-heads") == "ann/heads"
    assert str(heads) not in card
    assert ModelCard(card).data.base_model == BASE


def test_a_card_written_by_hand_is_kept(api: type[FakeApi], heads: Path) -> None:
    (heads / "README.md").write_text("Mine: --adadecode-heads './a b' --seed 1\n")
    push_to_hub(heads, "ann/heads")
    card = api.made[0].files["README.md"].decode()
    assert card == "Mine: --adadecode-heads ann/heads --seed 1\n"


def test_a_missing_card_is_made(api: type[FakeApi], heads: Path) -> None:
    (heads / "README.md").unlink()
    push_to_hub(heads, "ann/heads")
    card = api.made[0].files["README.md"].decode()
    assert argument(serve_words(card), "--adadecode-heads") == "ann/heads"
    assert not (heads / "README.md").exists()


def test_push_from_the_cache(api: type[FakeApi], hub: Hub, heads: Path) -> None:
    publish(hub, heads)
    push_to_hub(from_pretrained("ann/heads"), "bob/heads")
    files = api.made[0].files
    assert files["model.safetensors"] == (heads / "model.safetensors").read_bytes()
    assert b"--adadecode-heads bob/heads" in files["README.md"]


def test_pull_request_to_a_branch(api: type[FakeApi], heads: Path) -> None:
    address = push_to_hub(heads, "ann/heads", revision="v1", create_pr=True)
    assert address == "https://hub/pr/1"
    assert api.made[0].commit["revision"] == "v1"


def test_private_repository(api: type[FakeApi], heads: Path) -> None:
    push_to_hub(heads, "ann/heads", private=True)
    assert api.made[0].created["private"] is True
    assert sorted(api.made[0].files) == FILES


def test_private_heads_are_not_published(api: type[FakeApi], heads: Path) -> None:
    api.is_private = False
    message = refusal(push_to_hub, heads, "ann/heads", private=True)
    assert message.startswith("REPO ann/heads: it exists already and is public")
    assert api.made[0].files == {}


def test_damaged_heads_are_not_published(api: type[FakeApi], heads: Path) -> None:
    os.truncate(heads / "model.safetensors", 40)
    message = refusal(push_to_hub, heads, "ann/heads")
    assert "truncated or damaged" in message
    assert api.made == []


def test_a_card_that_links_elsewhere_is_not_published(
    api: type[FakeApi], heads: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("secret")
    (heads / "README.md").unlink()
    (heads / "README.md").symlink_to(tmp_path / "secret")
    message = refusal(push_to_hub, heads, "ann/heads")
    assert "README.md is a link that leaves the directory" in message
    assert api.made == []


@pytest.mark.parametrize("repo_id", ["heads", "a/b/c", "ann/my heads"])
def test_malformed_repository(api: type[FakeApi], heads: Path, repo_id: str) -> None:
    message = refusal(push_to_hub, heads, repo_id)
    assert message == (
        f"REPO {repo_id}: not the name of a repository; give it as namespace/name"
    )


def test_failed_upload_is_a_sentence(api: type[FakeApi], heads: Path) -> None:
    api.error = RuntimeError("connection reset\nby peer")
    message = refusal(push_to_hub, heads, "ann/heads")
    assert message == (
        "REPO ann/heads: the Hugging Face Hub gave an error (connection reset); check "
        "the connection and try again"
    )


def test_a_local_base_model_is_warned_of(
    api: type[FakeApi], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_pretrained(tmp_path, make_weights(), make_config(base_model="/models/x"))
    push_to_hub(tmp_path, "ann/heads")
    assert "'/models/x' as their base model" in caplog.text
