# SPDX-License-Identifier: Apache-2.0
"""Publishing heads on the Hub: `push_to_hub`, as huggingface_hub names it."""

import logging
from functools import partial
from os import PathLike
from pathlib import Path

from adadecode_vllm import __version__
from adadecode_vllm.errors import AdaDecodeError, first_line
from adadecode_vllm.heads.config import ExitHeadsConfig, load_heads_config
from adadecode_vllm.heads.files import (
    CARD_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    config_path,
    heads_error,
    real_path,
    weights_path,
)
from adadecode_vllm.heads.hub import LIBRARY, is_hub_id
from adadecode_vllm.heads.hub_errors import explained
from adadecode_vllm.toolkit.publishing.card import (
    name_repository,
    render_card,
)

logger = logging.getLogger(__name__)


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
    api = HfApi(token=token, library_name=LIBRARY, library_version=__version__)
    with explained(partial(_push_error, repo_id), revision):
        api.create_repo(repo_id, private=private, exist_ok=True)
        is_public = private and not api.model_info(repo_id).private
    if is_public:
        raise _push_error(
            repo_id,
            "it exists already and is public, but a private one was asked for",
            "choose another name or change its visibility on the Hub",
        )
    with explained(partial(_push_error, repo_id), revision):
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
    # A card that links elsewhere would publish a file of the user's machine.
    path = real_path(directory, CARD_FILE)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise heads_error(
            directory,
            f"{CARD_FILE} cannot be read ({first_line(error)})",
            "save it as UTF-8 text, or remove it to have one made",
        ) from error


def _push_error(repo_id: str, reason: str, remedy: str) -> AdaDecodeError:
    """The error for a repository that cannot be written."""
    return AdaDecodeError(f"REPO {repo_id}: {reason}; {remedy}")
