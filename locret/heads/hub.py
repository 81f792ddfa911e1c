"""The Hugging Face Hub: fetch a repository, upload files in one commit, errors in one line.

Which files are an artifact's is `locret.heads.files`'s business.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOKENS_PAGE = "https://huggingface.co/settings/tokens"
HOW_TO_GET_A_TOKEN = (
    f"make one with write access at {TOKENS_PAGE}, then run `hf auth login`, set HF_TOKEN, or give "
    "--token"
)
_WRAPPERS = 5  # how many exceptions deep the one that says what happened may lie


@dataclass(frozen=True)
class Upload:
    """A file to upload: its name in the repository, and where its content is, or the content."""

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """Bytes."""
        if isinstance(self.content, bytes):
            return len(self.content)
        return self.content.stat().st_size


def download(
    repo_id: str,
    *,
    patterns: Sequence[str],
    revision: str | None,
    token: str | None,
    repo_type: str = "model",
) -> Path:
    """The local copy of the files of a repository that match; the folder may not exist if none do.

    Raises:
        ValueError: no such repository or revision, or it could not be fetched as a whole.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        return Path(
            snapshot_download(
                repo_id,
                repo_type=repo_type,
                revision=revision,
                token=token,
                allow_patterns=list(patterns),
            )
        )
    except HFValidationError as error:
        raise ValueError(
            f"{repo_id!r} is neither an existing path nor a Hub repository id: {_one_line(error)}"
        ) from error
    except (HTTPError, OSError, RuntimeError) as error:
        raise ValueError(
            f"{repo_id!r} is no path here, and the Hub did not give it: {_reason(error, revision)}"
        ) from error


def upload(
    repo_id: str,
    files: Sequence[Upload],
    *,
    message: str,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Upload files in one commit, making the repository and the branch if need be.

    Args:
        repo_id: OWNER/NAME.
        files: what to upload; other files of the repository stay as they are.
        message: of the commit.
        private: make the repository private; one that exists and is public is then refused.
        token: with write access; default the one that the environment or `hf auth login` holds.
        revision: branch to commit to; default `main`.

    Returns:
        The repository's address.

    Raises:
        ValueError: it could not be done, and why. A commit is there as a whole or not at all.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HTTPError

    check_repo_id(repo_id)
    if not has_token(token):
        raise ValueError(f"no token to push to {repo_id} with: {HOW_TO_GET_A_TOKEN}")
    api = HfApi(token=token)
    try:
        url = _open_repository(api, repo_id, private, revision)
        operations = [CommitOperationAdd(file.name, file.content) for file in files]
        api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"push to {repo_id} failed: {_reason(error, revision)} (a push is one commit, there as "
            "a whole or not at all; it is safe to repeat)"
        ) from error
    return url if revision is None else f"{url}/tree/{revision}"


def check_repo_id(repo_id: str) -> None:
    """Raises ValueError unless it reads OWNER/NAME as the Hub wants it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no repository id: {_one_line(error)}") from error
    if "/" not in repo_id:
        raise ValueError(f"repository id {repo_id!r} lacks its owner; expected OWNER/{repo_id}")


def has_token(token: str | None = None) -> bool:
    """Whether a token is given, in the environment, or stored by `hf auth login`."""
    from huggingface_hub import get_token

    return bool(token or get_token())


def address(repo_id: str) -> str:
    """The page of a repository on the Hub that is set (`HF_ENDPOINT`)."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo_id}"


def _open_repository(api: Any, repo_id: str, private: bool, revision: str | None) -> str:
    """Make the repository and the branch unless they exist. Returns the address."""
    url = str(api.create_repo(repo_id, private=private, exist_ok=True))
    if private and not api.repo_info(repo_id).private:
        raise ValueError(
            f"{url} exists already and is public; make it private in its settings, choose another "
            "name, or push without private"
        )
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return url


def _reason(error: BaseException, revision: str | None) -> str:
    """What went wrong, in one line."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    error = _root(error)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision {revision!r}"
    if isinstance(error, GatedRepoError):
        return "it is gated; ask for access on its page, and use a token of that account"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private and needs a token that may read it"
    if status == 401:
        return f"the token was not accepted (401); {HOW_TO_GET_A_TOKEN}"
    if status == 403:
        return f"the token may not do this (403); {HOW_TO_GET_A_TOKEN}"
    if isinstance(error, HTTPError) and not isinstance(error, HfHubHTTPError):
        what = _one_line(error) or type(error).__name__
        return f"the connection to {constants.ENDPOINT} broke: {what}"
    return _one_line(error)


def _root(error: BaseException) -> BaseException:
    """The exception that says what happened, out of those that only say where."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    for _ in range(_WRAPPERS):
        if not isinstance(error, RuntimeError | LocalEntryNotFoundError) or not error.__cause__:
            break
        error = error.__cause__
    return error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
