# SPDX-License-Identifier: Apache-2.0
"""Sharing heads: `save_pretrained`, `from_pretrained` and `push_to_hub`.

The names and arguments are huggingface_hub's, as functions on heads directories. From a
repository only `config.json`, `model.safetensors` and `README.md` are ever fetched, and
the weights only once the configuration has turned out to be that of exit heads.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adadecode_vllm import __version__
from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.files import write_whole
from adadecode_vllm.heads.card import (
    CARD_FILE,
    is_hub_id,
    name_repository,
    render_card,
)
from adadecode_vllm.heads.config import MODEL_TYPE, ExitHeadsConfig, load_heads_config
from adadecode_vllm.heads.files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    config_path,
    heads_error,
    weights_path,
)

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_LIBRARY = "adadecode-vllm"


def make_speculators_config(
    base_model: str, architectures: Sequence[str] = (), speculative_tokens: int = 5
) -> dict[str, Any]:
    """Describe the heads in the form of the `speculators` project.

    Args:
        base_model: Name or path of the model that verifies.
        architectures: `architectures` of its `config.json`.
        speculative_tokens: Most early predictions at a time.

    Returns:
        The value of `speculators_config`. `greedy` with its defaults says that a draft
        is accepted if it is the model's own token. vLLM does not start from this block:
        there is no `speculators_model_type` beside it, `--adadecode-heads` is the way.
    """
    return {
        "algorithm": MODEL_TYPE,
        "proposal_methods": [
            {
                "proposal_type": "greedy",
                "speculative_tokens": speculative_tokens,
                "verifier_accept_k": 1,
                "accept_tolerance": 0.0,
            }
        ],
        "default_proposal_method": "greedy",
        "verifier": {
            "name_or_path": base_model,
            "architectures": list(architectures),
        },
    }


def save_pretrained(
    directory: str | PathLike[str],
    weights: "Mapping[int, torch.Tensor]",
    config: ExitHeadsConfig,
    *,
    draft_token_ids: "torch.Tensor | None" = None,
    architectures: Sequence[str] = (),
    training: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
) -> ExitHeadsConfig:
    """Write a heads directory that can be published: configuration, weights and card.

    Args:
        directory: The directory; created with its parents if missing, heads in it are
            replaced.
        weights: T per exit layer, shape (d, d), as `save_heads` takes them.
        config: The configuration. `speculators_config` is filled in if it is None, and
            `draft_vocabulary` where there are token ids.
        draft_token_ids: The draft vocabulary, as `save_heads` takes it.
        architectures: `architectures` of the base model's `config.json`.
        training: What made the heads, for the card; see `write_card`.
        evaluation: `evaluation.json`, decoded, for the card.

    Returns:
        The configuration that was written.

    Raises:
        AdaDecodeError: The evaluation is incomplete; nothing was written.
        ValueError: The weights or the token ids do not fit the configuration; nothing
            was written.
        OSError: The files cannot be written.
    """
    from adadecode_vllm.heads.io import save_heads, with_draft_vocabulary

    if config.speculators_config is None:
        block = make_speculators_config(config.base_model, architectures)
        config = config.model_copy(update={"speculators_config": block})
    if draft_token_ids is not None:  # the card names it
        config = with_draft_vocabulary(config, draft_token_ids)
    # Rendered before anything is replaced: figures that are wrong must not leave new
    # heads under an old card.
    card = render_card(config, str(directory), training=training, evaluation=evaluation)
    save_heads(directory, weights, config, draft_token_ids)
    write_whole(Path(directory) / CARD_FILE, card.encode())
    return config


def resolve_heads(name_or_path: str | PathLike[str]) -> Path:
    """Return the local directory of what `--adadecode-heads` names.

    Args:
        name_or_path: A directory, or a repository on the Hub: `namespace/name`, or
            `namespace/name@revision`. A directory that exists wins.

    Returns:
        The directory. It is checked by `load_heads_config`, not here.

    Raises:
        AdaDecodeError: There is no such directory or repository.
    """
    name = str(name_or_path)
    repo_id, at, revision = name.partition("@")
    if at and revision and not Path(name).exists() and is_hub_id(repo_id):
        return from_pretrained(repo_id, revision=revision)
    return from_pretrained(name_or_path)


def from_pretrained(
    name_or_path: str | PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return a local heads directory, downloading it if need be.

    Args:
        name_or_path: A directory, or a repository on the Hub, `namespace/name`. A
            directory that exists wins.
        revision: Branch, tag or commit of the repository; None for its main branch.
        token: Access token; None for the one that `hf auth login` saved, False for
            none.
        cache_dir: Where downloads are kept; None for huggingface_hub's own cache.
        local_files_only: Never connect; use what was downloaded before.

    Returns:
        The directory given, or that in the cache. The files are checked by
        `load_heads_config`, not here.

    Raises:
        AdaDecodeError: There is no such directory or repository, the Hub cannot be
            reached, or the repository holds no exit heads.
    """
    directory = Path(name_or_path)
    name = str(name_or_path)
    if directory.exists() or not is_hub_id(name):
        config_path(directory)  # explains what is wrong with a path
        return directory

    from huggingface_hub import snapshot_download

    def fetch(files: list[str], revision: str | None) -> Path:
        with _explained(partial(heads_error, directory), revision):
            snapshot = snapshot_download(
                name,
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else str(cache_dir),
                local_files_only=local_files_only,
                allow_patterns=files,
                library_name=_LIBRARY,
                library_version=__version__,
            )
        return Path(snapshot)

    snapshot = fetch([CONFIG_FILE], revision)
    _check_model_type(directory, snapshot)
    # The snapshot is named by its commit: the weights must be of the same.
    snapshot = fetch([WEIGHTS_FILE, CARD_FILE, CONFIG_FILE], snapshot.name)
    if not (snapshot / WEIGHTS_FILE).is_file():
        raise heads_error(
            directory,
            f"the repository holds no {WEIGHTS_FILE}, and only safetensors are loaded",
            "name a repository whose weights are safetensors",
        )
    return snapshot


def push_to_hub(
    directory: str | PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload exit heads",
) -> str:
    """Publish a heads directory: configuration, weights and card in one commit.

    The directory itself is not changed. A card that is missing is made from the
    configuration; in the published one the serve command names the repository.

    Args:
        directory: The heads directory.
        repo_id: The repository, `namespace/name`; created if it does not exist.
        private: Create it for its owner's eyes only. A public repository that exists
            already is refused then.
        token: Access token with the right to write; None for the one that `hf auth
            login` saved.
        revision: Branch to commit to; None for the main branch.
        create_pr: Open a pull request instead of committing.
        commit_message: First line of the commit.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        AdaDecodeError: The directory holds no valid heads, the repository's name is
            malformed, or the Hub refused.
    """
    directory = Path(directory)
    config = load_heads_config(directory)
    if not is_hub_id(repo_id):
        raise _push_error(
            repo_id, "not the name of a repository", "give it as namespace/name"
        )
    card = name_repository(_read_card(directory, config), repo_id)
    if not is_hub_id(config.base_model):
        logger.warning(
            "These heads name %r as their base model, which nobody else can look up: "
            "make them from the model's name on the Hub, if it has one.",
            config.base_model,
        )

    from huggingface_hub import CommitOperationAdd, HfApi

    operations = [
        CommitOperationAdd(CONFIG_FILE, str(config_path(directory))),
        CommitOperationAdd(WEIGHTS_FILE, str(weights_path(directory))),
        CommitOperationAdd(CARD_FILE, card.encode()),
    ]
    api = HfApi(token=token, library_name=_LIBRARY, library_version=__version__)
    with _explained(partial(_push_error, repo_id), revision):
        api.create_repo(repo_id, private=private, exist_ok=True)
        is_public = private and not api.model_info(repo_id).private
    if is_public:
        raise _push_error(
            repo_id,
            "it exists already and is public, but a private one was asked for",
            "choose another name or change its visibility on the Hub",
        )
    with _explained(partial(_push_error, repo_id), revision):
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
    return str(commit.pr_url or commit.commit_url)


def _read_card(directory: Path, config: ExitHeadsConfig) -> str:
    """Read the directory's card, or render one from the configuration."""
    path = directory / CARD_FILE
    if not path.exists():
        return render_card(config, str(directory))
    # A card that links elsewhere would publish a file of the user's machine. In the
    # cache of downloads every file is such a link, within the cache.
    root = directory.resolve()
    places = [root]
    if root.parent.name == "snapshots":
        places.append(root.parent.parent / "blobs")
    if not any(path.resolve().is_relative_to(place) for place in places):
        raise heads_error(
            directory,
            f"{CARD_FILE} is a link that leaves the directory",
            "copy the file itself there",
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise heads_error(
            directory,
            f"{CARD_FILE} cannot be read ({_first_line(error)})",
            "save it as UTF-8 text, or remove it to have one made",
        ) from error


def _check_model_type(directory: Path, snapshot: Path) -> None:
    """Refuse a repository of something else before its weights are fetched."""
    try:
        values = json.loads((snapshot / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        values = None
    except (OSError, ValueError, RecursionError) as error:
        raise heads_error(
            directory,
            f"{CONFIG_FILE} of the repository is not JSON ({_first_line(error)})",
            "name a repository of exit heads",
        ) from error
    found = values.get("model_type") if isinstance(values, dict) else None
    if found != MODEL_TYPE:
        what = f"no {CONFIG_FILE}" if values is None else f"model_type {found!r}"
        raise heads_error(
            directory,
            f"the repository has {what} instead of model_type {MODEL_TYPE!r}",
            "name a repository of exit heads, not of a model",
        )


@contextmanager
def _explained(
    make_error: Callable[[str, str], AdaDecodeError], revision: str | None
) -> Iterator[None]:
    """Turn whatever the Hub's client raises into one sentence.

    Not narrower than Exception: the errors of the HTTP client below huggingface_hub are
    no OSErrors, and it is another client in every major version. Hence nothing but
    calls to huggingface_hub belongs inside.
    """
    try:
        yield
    except Exception as error:
        raise make_error(*_explain(error, revision)) from error


def _explain(error: Exception, revision: str | None) -> tuple[str, str]:
    """Say what the Hub's refusal means, and what to do: reason and remedy."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    log_in = "log in with `hf auth login` or pass a token that may do this"
    if isinstance(error, GatedRepoError):  # a RepositoryNotFoundError as well
        return (
            "the repository is gated and this account has no access",
            f"ask for access on its page, then {log_in}",
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            "neither a local directory nor a repository that the Hugging Face Hub "
            "shows to this account",
            f"check the name, or {log_in}",
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"the repository has no revision {revision!r}",
            "name a branch, tag or commit that it has",
        )
    if isinstance(error, LocalEntryNotFoundError):
        cause = error.__cause__
        hub = f"does not answer ({_first_line(cause)})" if cause else "was not asked"
        return (
            f"neither a local directory nor downloaded before, and the Hugging Face "
            f"Hub {hub}",
            "check the path, or the name and the connection",
        )
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"the Hugging Face Hub refused access ({_first_line(error)})", log_in
    return (
        f"the Hugging Face Hub gave an error ({_first_line(error)})",
        "check the connection and try again",
    )


def _push_error(repo_id: str, reason: str, remedy: str) -> AdaDecodeError:
    """The error for a repository that cannot be written."""
    return AdaDecodeError(f"REPO {repo_id}: {reason}; {remedy}")


def _first_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
