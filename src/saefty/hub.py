"""Files from the Hugging Face hub: only those asked for, checked, and every fault with its name.

What is fetched lies in the hub's own cache (HF_HOME) and is not fetched again; with HF_HUB_OFFLINE
set nothing else is used. A file is checked against the name of its blob, which is a checksum of its
content: SHA-256 for large files, git's for small ones. Messages say what happened and never quote
an answer of the hub, which may hold an address with a key in it.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from saefty.environment import HUB_NAMES, secret
from saefty.errors import ExternalError, IntegrityError, SaeftyError, UnknownNameError
from saefty.fsio import DISK_FULL, READ_BLOCK, disk_error

TOKEN = "HF_TOKEN"  # noqa: S105 - the variable's name
SAFE = "Nothing was loaded; files that were fetched whole stay in the cache (HF_HOME)."
SHA256, SHA1 = 64, 40
"""Digits of the two checksums."""


@dataclass(frozen=True)
class Fetched:
    """Files of one commit of a repository."""

    folder: Path
    """The commit's folder in the cache; the files lie in it under their own names."""

    revision: str
    """The commit."""

    sha256: dict[str, str]
    """A checksum of every file that was asked for and is there."""


def fetch(repo: str, files: Sequence[str], revision: str | None = None) -> Fetched:
    """Fetch files of a repository, or find them in the cache.

    Args:
        repo: OWNER/NAME.
        files: Paths inside the repository; those that it does not have are left out.
        revision: A branch, tag or commit; None takes the main branch.

    Raises:
        UnknownNameError: If there is no such repository or revision.
        ExternalError: If the hub refuses or cannot be reached.
        IntegrityError: If a file does not hold what the hub announces.
        DiskError: If the cache cannot be written.
    """
    import huggingface_hub

    patterns = [_literal(name) for name in files]
    with hub_errors(repo, revision):
        folder = Path(
            huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns)
        )
    there = [name for name in files if (folder / name).is_file()]
    return Fetched(folder, folder.name, {name: checked(folder / name) for name in there})


def list_files(repo: str, revision: str | None = None) -> list[str]:
    """Return the paths of all files of a repository.

    Raises:
        SaeftyError: As `fetch`.
    """
    import huggingface_hub

    with hub_errors(repo, revision):
        return sorted(huggingface_hub.HfApi().list_repo_files(repo, revision=revision))


def checked(path: Path) -> str:
    """Return the SHA-256 of a file, after comparing it with the name of the hub's blob.

    A file that is no link into a cache has no such name and is not compared.

    Raises:
        IntegrityError: If the file's bytes are not those of its blob.
    """
    name, blob = "", path
    if path.is_symlink():
        blob = Path(os.path.normpath(path.parent / path.readlink()))
        name = blob.name if blob.parent.name == "blobs" else ""
    size = path.stat().st_size
    sha256 = hashlib.sha256()
    git = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(READ_BLOCK):
            sha256.update(block)
            if len(name) == SHA1:
                git.update(block)
    found = {SHA256: sha256.hexdigest(), SHA1: git.hexdigest()}.get(len(name))
    if found is not None and _hexadecimal(name) and found != name:
        raise IntegrityError(
            f"{path.name} does not hold what the hub announces: its checksum is {found}, "
            f"announced was {name}.",
            safe="It was not loaded.",
            then=f"Delete {blob} and run the same command again; it is fetched anew.",
        )
    return sha256.hexdigest()


@contextmanager
def hub_errors(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turn the ways in which a request fails into one of our errors.

    Raises:
        UnknownNameError: If there is no such repository or revision.
        ExternalError: If the hub refuses or cannot be reached.
        IntegrityError: If a file came with another size.
        DiskError: If the cache cannot be written.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    kinds = (*HfHubHTTPError.__bases__, OSError)  # httpx's errors, whatever it is called now
    try:
        yield
    except HFValidationError as error:
        raise UnknownNameError(
            f"{repo!r} cannot be the name of a repository on the hub.",
            then="Write it as OWNER/NAME, such as google/gemma-scope-2b-pt-res.",
        ) from error
    except Exception as error:
        if not isinstance(error, kinds):
            raise
        problem: SaeftyError = explained(error, repo, revision)
        raise problem from error


def explained(error: Exception, repo: str, revision: str | None = None) -> SaeftyError:
    """Return what to tell the user of a failed request."""
    from huggingface_hub import errors

    chain = _chain(error)
    status = next((code for one in chain if (code := _status(one))), None)
    if any(isinstance(one, errors.GatedRepoError) for one in chain):
        return ExternalError(
            f"{repo} is gated: its owner asks for a consent before it may be fetched, and the hub "
            f"has none for this account ({_token_state()}).",
            safe=SAFE,
            then=f"Accept the conditions on the repository's page ({repo}), then set {TOKEN} to a "
            "token of that account, in the environment or in .env.",
        )
    if any(isinstance(one, errors.RevisionNotFoundError) for one in chain):
        return UnknownNameError(
            f"{repo} has no revision {revision!r}.",
            safe=SAFE,
            then="Name a branch, a tag or a commit that it has, or leave the revision out.",
        )
    # Without a valid token the hub answers 401 for what is private and for what is not there.
    hidden = status == 401 and not any(_bad_token(one) for one in chain)
    if hidden or any(isinstance(one, errors.RepositoryNotFoundError) for one in chain):
        return UnknownNameError(
            f"the hub has no repository {repo}, or keeps it private ({_token_state()}).",
            safe=SAFE,
            then="Check the spelling (saefty sae list shows releases); a private repository needs "
            f"{TOKEN}.",
        )
    if status in (401, 403):
        return ExternalError(
            f"the hub refuses access to {repo} (status {status}; {_token_state()}).",
            safe=SAFE,
            then=f"Set {TOKEN} to a token that is valid and may read {repo}, in the environment or "
            "in .env; without a token, public repositories can be read.",
        )
    if status == 429:
        wait = next((text for one in chain if (text := _retry_after(one))), "")
        return ExternalError(
            f"the hub has had too many requests and did not give {repo} (status 429{wait}).",
            safe=SAFE,
            then=f"Run the same command later; with {TOKEN} set the limit is higher.",
        )
    if status is not None:
        return ExternalError(
            f"the hub failed while giving {repo} (status {status}).",
            safe=SAFE,
            then="Run the same command again; what is in the cache is not fetched twice.",
        )
    return _without_an_answer(chain, repo)


def _without_an_answer(chain: Sequence[BaseException], repo: str) -> SaeftyError:
    from huggingface_hub.errors import OfflineModeIsEnabled

    full = next((e for e in chain if isinstance(e, OSError) and e.errno in DISK_FULL), None)
    if full is not None:
        return disk_error(Path(full.filename or "HF_HOME"), full)
    if any("onsistency check" in str(one) for one in chain):
        return IntegrityError(
            f"a file of {repo} came with another size than the hub announces.",
            safe=SAFE,
            then="Run the same command again; the file is fetched anew.",
        )
    offline = any(isinstance(one, OfflineModeIsEnabled) for one in chain)
    if offline or any("outgoing traffic has been disabled" in str(one) for one in chain):
        return ExternalError(
            f"HF_HUB_OFFLINE is set, and the cache does not hold what was asked of {repo}.",
            safe=SAFE,
            then="Run it once with a network and HF_HUB_OFFLINE=0, set HF_HOME to the cache that "
            "has it, or name a folder.",
        )
    kinds = {type(one).__name__ for one in chain}
    if kinds & {"RemoteProtocolError", "ReadError", "ReadTimeout", "IncompleteRead"}:
        return ExternalError(
            f"the connection was cut while {repo} was fetched.",
            safe=SAFE,
            then="Run the same command again; whole files are not fetched twice.",
        )
    return ExternalError(
        f"the hub cannot be reached to fetch {repo} ({type(chain[-1]).__name__}).",
        safe=SAFE,
        then="Check the network (and HF_ENDPOINT, if it is set), or name a folder; "
        f"{TOKEN} is needed where access is restricted.",
    )


def _chain(error: BaseException) -> list[BaseException]:
    """Return an error and its causes, the first last."""
    found: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in found:
        found.append(one)
        one = one.__cause__ or one.__context__
    return found


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None)


def _bad_token(error: BaseException) -> bool:
    headers = getattr(getattr(error, "response", None), "headers", {})
    return "nvalid credentials" in str(headers.get("X-Error-Message", ""))


def _retry_after(error: BaseException) -> str:
    headers = getattr(getattr(error, "response", None), "headers", {})
    value = str(headers.get("Retry-After", ""))
    return f", try again after {value} s" if value.isdecimal() else ""


def _token_state() -> str:
    """Say whether there is a token, and not which."""
    import huggingface_hub

    if any(secret(name) for name in HUB_NAMES):
        return f"{TOKEN} is set"
    stored = huggingface_hub.get_token() is not None
    return "the token that hf auth login stored was used" if stored else f"{TOKEN} is not set"


def _literal(name: str) -> str:
    """Return a pattern that matches one path only."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _hexadecimal(text: str) -> bool:
    return all(letter in "0123456789abcdef" for letter in text)
