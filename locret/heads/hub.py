"""The Hugging Face Hub: fetch a repository, upload files in one commit, errors in one line.

Which files are an artifact's is `locret.heads.files`'s business. `huggingface_hub.ModelHubMixin` is
not used: it knows neither the released format nor a card that is somebody's own.
"""

from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

TOKENS_PAGE = "https://huggingface.co/settings/tokens"
HOW_TO_GET_A_TOKEN = (
    f"make one with write access at {TOKENS_PAGE}, then run `hf auth login`, set HF_TOKEN, or give "
    "--token"
)
_REFUSALS = {
    401: f"the token was not accepted (401); {HOW_TO_GET_A_TOKEN}",
    403: f"the token may not do this (403); {HOW_TO_GET_A_TOKEN}",
}
_NOT_FOUND: dict[type[Exception], str] = {  # some of them are others too: the first that fits
    RevisionNotFoundError: "it has no revision {revision!r}",
    GatedRepoError: "it is gated; ask for access on its page, and use a token of that account",
    RepositoryNotFoundError: (
        "there is no such repository, or it is private and needs a token that may read it"
    ),
}


def download(
    repo_id: str,
    *,
    patterns: Sequence[str],
    revision: str | None = None,
    token: str | None = None,
    repo_type: str = "model",
) -> Path:
    """The local copy of the files of a repository that match; the folder may not exist if none do.
    ValueError: no such repository or revision, or it could not be fetched as a whole."""
    try:
        folder = huggingface_hub.snapshot_download(
            repo_id,
            repo_type=repo_type,
            revision=revision,
            token=token,
            allow_patterns=list(patterns),
        )
    except HFValidationError as error:
        raise ValueError(
            f"{repo_id!r} is neither an existing path nor a Hub repository id: {_one_line(error)}"
        ) from error
    except (HTTPError, OSError, RuntimeError) as error:
        raise ValueError(
            f"{repo_id!r} is no path here, and the Hub did not give it: {_reason(error, revision)}"
        ) from error
    return Path(folder)


def upload(
    repo_id: str,
    files: Sequence[CommitOperationAdd],
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Upload the files of an artifact in one commit, making repository and branch if need be.

    Args:
        repo_id: OWNER/NAME.
        files: what to upload; other files of the repository stay as they are.
        private: make the repository private; one that exists and is public is then refused.
        token: with write access; default the one that the environment or `hf auth login` holds.
        revision: branch to commit to; default `main`.

    Returns:
        The repository's address. A commit is there as a whole or, with a ValueError, not at all.
    """
    check_repo_id(repo_id)
    if not has_token(token):
        raise ValueError(f"no token to push to {repo_id} with: {HOW_TO_GET_A_TOKEN}")
    api = HfApi(token=token)
    try:
        url = str(api.create_repo(repo_id, private=private, exist_ok=True))
        if private and not api.repo_info(repo_id).private:
            raise ValueError(
                f"{url} exists already and is public; make it private in its settings, choose "
                "another name, or push without private"
            )
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        api.create_commit(repo_id, files, commit_message="Upload heads", revision=revision)
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"push to {repo_id} failed: {_reason(error, revision)} (a push is one commit, there as "
            "a whole or not at all; it is safe to repeat)"
        ) from error
    return url if revision is None else f"{url}/tree/{revision}"


def check_repo_id(repo_id: str) -> None:
    """Raises ValueError unless it reads OWNER/NAME as the Hub wants it."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no repository id: {_one_line(error)}") from error
    if "/" not in repo_id:
        raise ValueError(f"repository id {repo_id!r} lacks its owner; expected OWNER/{repo_id}")


def has_token(token: str | None = None) -> bool:
    """Whether a token is given, in the environment, or stored by `hf auth login`."""
    return bool(token or huggingface_hub.get_token())


def _reason(error: BaseException, revision: str | None) -> str:
    """What went wrong, in one line."""
    # Some errors only say where another one happened.
    while isinstance(error, RuntimeError | LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__
    for kind, says in _NOT_FOUND.items():
        if isinstance(error, kind):
            return says.format(revision=revision)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in _REFUSALS:
        return _REFUSALS[status]
    if isinstance(error, HTTPError) and not isinstance(error, HfHubHTTPError):
        what = _one_line(error) or type(error).__name__
        return f"the connection to {constants.ENDPOINT} broke: {what}"
    return _one_line(error)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
