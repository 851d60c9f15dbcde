"""Queries the API of the Hugging Face hub: the files of a repository, and which of them form the model.

`huggingface_hub` handles addresses, tokens and errors, which become messages here. Downloads no file.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import httpx2
import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from router import __version__
from router.store.repository import Q4_ABOVE_BYTES, Choice, Reference, choose, gated, is_plain

ANSWER_SEC = 30.0
PAUSES_SEC = (0.5, 1, 2, 4, 8, 16)
"""Pauses between attempts."""
_TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})


class HubError(Exception):
    """Raised when the hub refuses or fails; the message says why and what to do, and the code is stable."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file on the hub."""

    path: str
    size: int
    blob: str
    """Its name in the cache: the SHA-256 of its content, or git's hash unless it is stored with LFS."""
    is_large: bool


@dataclass(frozen=True, slots=True)
class Found:
    """What a reference resolves to, at the current commit."""

    commit: str
    choice: Choice
    files: tuple[HubFile, ...]
    """The files of the choice, in its order."""


class HubRepository:
    def __init__(self, reference: Reference, environ: Mapping[str, str]) -> None:
        self.reference = reference
        self.endpoint = environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
        self._environ = environ

    def find(self, wait: Callable[[float], object]) -> Found:
        """Resolve the reference to files; `wait` is called between attempts. Raises HubError, NoChoice."""
        commit, files = self._listing(wait)
        sizes = {path: file.size for path, file in files.items()}
        choice = choose(self.reference, sizes, _q4_above_bytes(self._environ))
        return Found(commit, choice, tuple(files[path] for path in choice.files))

    def url(self, commit: str, path: str) -> str:
        """Return the URL of a file."""
        return huggingface_hub.hf_hub_url(self.reference.repo, path, revision=commit, endpoint=self.endpoint)

    def _listing(self, wait: Callable[[float], object]) -> tuple[str, dict[str, HubFile]]:
        """Return the commit and the files of the repository."""
        api = huggingface_hub.HfApi(self.endpoint, library_name="llama-router", library_version=__version__)
        reference = self.reference
        for pause_sec in (*PAUSES_SEC[:3], None):
            with self.explained(last_try=pause_sec is None):
                try:
                    found = api.model_info(
                        reference.repo, revision=reference.revision, files_metadata=True, timeout=ANSWER_SEC
                    )
                except (ValueError, TypeError, KeyError):  # the answer is not the hub's
                    message = f"{self.endpoint} does not answer as the Hugging Face hub does: check HF_ENDPOINT"
                    raise HubError("hub_error", message) from None
                break
            wait(pause_sec or 0)
        commit = found.sha or ""
        if not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise HubError("hub_error", f"{self.endpoint} does not report the commit of {reference}")
        files: dict[str, HubFile] = {}
        for sibling in found.siblings or []:
            blob = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
            size = sibling.lfs.size if sibling.lfs else sibling.size
            if (
                is_plain(sibling.rfilename)
                and size is not None
                and blob
                and re.fullmatch(r"[0-9a-f]{40,64}", blob)
            ):
                files[sibling.rfilename] = HubFile(sibling.rfilename, size, blob, sibling.lfs is not None)
        return commit, files

    @contextlib.contextmanager
    def explained(self, *, last_try: bool) -> Iterator[None]:
        """Translate the hub's errors; transient ones are ignored unless this is the last attempt."""
        repo = self.reference.repo
        try:
            yield
        except OfflineModeIsEnabled:
            raise HubError("offline", "HF_HUB_OFFLINE is set: nothing is downloaded") from None
        except GatedRepoError:
            raise HubError("gated", gated(f"{self.endpoint}/{repo}")) from None
        except RepositoryNotFoundError:
            message = f"there is no repository {repo} on {self.endpoint}, or it is private: then set HF_TOKEN"
            raise HubError("not_found", message) from None
        except RevisionNotFoundError:
            raise HubError("not_found", f"{repo} has no revision {self.reference.revision}") from None
        except RemoteEntryNotFoundError:
            raise HubError("not_found", f"{repo} lost a file during the pull: pull again") from None
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403):
                message = f"{self.endpoint} denies access to {repo} (HTTP {status}): check HF_TOKEN"
                raise HubError("access_denied", message) from None
            if status not in _TRANSIENT or last_try:
                raise HubError("hub_error", f"{self.endpoint} answers HTTP {status} for {repo}") from None
        except (httpx2.RequestError, httpx2.InvalidURL) as error:
            if last_try or isinstance(error, httpx2.InvalidURL):
                reason = str(error) or type(error).__name__
                raise HubError(
                    "unreachable", f"{self.endpoint} cannot be reached, or closed the connection: {reason}"
                ) from None


def _q4_above_bytes(environ: Mapping[str, str]) -> int:
    text = environ.get("MODEL_Q4_THRESHOLD_BYTES") or str(Q4_ABOVE_BYTES)
    if not text.isdecimal():
        raise HubError("invalid_threshold", f"MODEL_Q4_THRESHOLD_BYTES: {text!r} is not a number of bytes")
    return int(text)
