# SPDX-License-Identifier: Apache-2.0
"""Sharing heads: the card, the local directory, downloads and uploads.

Downloads run huggingface_hub itself against a local server that speaks the Hub's
protocol; uploads stop at its `HfApi`.
"""

import hashlib
import json
import os
import shlex
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard

from adadecode_vllm import __version__
from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads import (
    ExitHeadsConfig,
    load_exit_weights,
    load_heads_config,
)
from adadecode_vllm.heads.card import is_hub_id, render_card, write_card
from adadecode_vllm.heads.hub import (
    from_pretrained,
    make_speculators_config,
    push_to_hub,
    resolve_heads,
    save_pretrained,
)
from tests.tiny import FINGERPRINT
from tests.unit.test_report import make_evaluation

D = 8
BASE = "meta-llama/Llama-3.1-8B-Instruct"
FILES = ["README.md", "config.json", "model.safetensors"]
TRAINING = {
    "argv": ["/home/ann/.venv/bin/adadecode", "train", BASE, "--data", "/data/x y/gsm"],
    "license": "llama3.1",
    "datasets": ["openai/gsm8k", "my texts"],
    "settings": {"objective": "kl", "epochs": 100, "max_length": None},
    "calibration": {"1": {"slope": 1.25}},
    "held_out": {
        "epoch": 7,
        "loss": {"1": 0.4567, "3": 0.1},
        "agreement": {"1": 0.8123, "3": 0.9},
    },
    "data": {"path": "/data/runs/gsm8k", "url": "https://example.org/a/b"},
    "note": "a | b\n<b>bold</b>",
}


def make_config(**values: Any) -> ExitHeadsConfig:
    defaults: dict[str, Any] = {
        "exit_layers": [1, 3],
        "hidden_size": D,
        "vocab_size": 32,
        "num_hidden_layers": 4,
        "base_model": BASE,
        "lm_head_fingerprint": FINGERPRINT,
    }
    return ExitHeadsConfig(**defaults | values)


def make_weights() -> dict[int, torch.Tensor]:
    torch.manual_seed(0)
    return {layer: torch.randn(D, D) for layer in (1, 3)}


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    directory = tmp_path / "heads"
    save_pretrained(directory, make_weights(), make_config(), training=TRAINING)
    return directory


def serve_words(card: str) -> list[str]:
    """Read the serve command as a shell would."""
    start = card.index("vllm serve")
    command = card[start : card.index("```", start)]
    return shlex.split(command.replace("\\\n", ""))


def argument(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


# save_pretrained


def test_save_pretrained(heads: Path) -> None:
    config = load_heads_config(heads)
    assert sorted(os.listdir(heads)) == FILES
    assert config == make_config(speculators_config=make_speculators_config(BASE))
    weights = load_exit_weights(heads, config)
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
                "speculative_tokens": 5,
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
    assert "LM head takes 7.1 % of an ordinary step" in card


def test_card_names_the_other_gate() -> None:
    evaluation = make_evaluation()
    evaluation["simulation"]["gate"] = "acceptance"
    words = serve_words(render_card(make_config(), "heads", evaluation=evaluation))
    assert json.loads(argument(words, "--adadecode-config"))["gate"] == "acceptance"


def test_card_recommends_nothing_that_is_slower() -> None:
    evaluation = make_evaluation(best={"threshold": 0.9, "cap": 1, "speedup": 0.97})
    card = render_card(make_config(), "heads", evaluation=evaluation)
    assert "--adadecode-config" not in card
    assert "No setting is predicted to be faster" in card


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


# Downloads


class Hub:
    """Repositories, as files by name, behind the part of the Hub's protocol we use."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.revisions = {"main": "1" * 40, "v1": "2" * 40}
        self.refuse: tuple[int, str | None] | None = None
        self.requests: list[str] = []

    def fetched(self) -> list[str]:
        """Name the files whose content was asked for, once each."""
        return sorted({p.split("/")[-1] for p in self.requests if p.startswith("GET")})

    def answer(self, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        path = path.split("?")[0]
        if self.refuse:
            status, code = self.refuse
            return status, {"X-Error-Code": code} if code else {}, b""
        api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models/").strip("/").split("/")
        files = self.repositories.get("/".join(parts[:2]))
        if files is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        revision = self.revisions.get(parts[3], parts[3])
        if revision not in self.revisions.values():
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if api and parts[2] == "revision":
            info = {"id": "/".join(parts[:2]), "sha": revision, "siblings": []}
            return 200, {}, json.dumps(info).encode()
        if api and parts[2] == "tree":
            tree = [
                {
                    "type": "file",
                    "path": name,
                    "size": len(content),
                    "oid": hashlib.sha1(content).hexdigest(),
                }
                for name, content in files.items()
            ]
            return 200, {}, json.dumps(tree).encode()
        content = files["/".join(parts[4:])]
        self.requests.append(f"{method} {path}")
        etag = hashlib.sha1(content).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": revision}, content


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def reply(self, method: str) -> None:
            status, headers, content = hub.answer(method, self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if method == "GET":
                self.wfile.write(content)

        def do_GET(self) -> None:
            self.reply("GET")

        def do_HEAD(self) -> None:
            self.reply("HEAD")

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache")
    )
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


def publish(hub: Hub, heads: Path, **more: bytes | None) -> None:
    """Put a heads directory and more files into `ann/heads`; None leaves one out."""
    files: dict[str, bytes | None] = {n: (heads / n).read_bytes() for n in FILES}
    files |= {name.replace("__", "."): content for name, content in more.items()}
    hub.repositories["ann/heads"] = {
        name: content for name, content in files.items() if content is not None
    }


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
    assert torch.equal(load_exit_weights(directory, config)[3], make_weights()[3])


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


@pytest.mark.parametrize("path", ["heads", "./heads", "/no/such/heads", "a/b/c"])
def test_missing_paths_are_not_looked_up(hub: Hub, path: str) -> None:
    message = refusal(resolve_heads, path)
    assert f"--adadecode-heads {Path(path)}: the path does not exist" in message
    assert hub.requests == []


# Uploads


class FakeApi:
    """Stands for `HfApi`: records, and behaves as it is told."""

    made: ClassVar[list[Any]] = []
    error: Exception | None = None
    is_private = True

    def __init__(self, **values: Any) -> None:
        self.values = values
        self.created: dict[str, Any] = {}
        self.commit: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        self.made.append(self)

    def create_repo(self, repo_id: str, **values: Any) -> None:
        self.created = {"repo_id": repo_id, **values}

    def model_info(self, repo_id: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.is_private)

    def create_commit(
        self, repo_id: str, operations: list[Any], **values: Any
    ) -> SimpleNamespace:
        if self.error:
            raise self.error
        self.commit = {"repo_id": repo_id, **values}
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()
        pull_request = "https://hub/pr/1" if values["create_pr"] else None
        return SimpleNamespace(commit_url="https://hub/commit/1", pr_url=pull_request)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    class Api(FakeApi):
        made: ClassVar[list[Any]] = []

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return Api


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


def test_spoilt_heads_are_not_published(api: type[FakeApi], heads: Path) -> None:
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
