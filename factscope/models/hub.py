"""The Hugging Face hub and its local cache: does a model exist, what would it cost, bring it here.

The hub's own client tries for up to half a minute when nothing answers. Here one request with a time-out comes first;
without an answer the cache is used and the handle carries a warning.
"""

from __future__ import annotations

import logging
import queue
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import huggingface_hub
from huggingface_hub import HfApi, constants, hf_hub_download, scan_cache_dir, try_to_load_from_cache
from huggingface_hub.errors import (
    CacheNotFound,
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tqdm.auto import tqdm

from factscope.errors import (
    FactScopeError,
    ModelFilesError,
    ModelGated,
    ModelNotCached,
    ModelNotFound,
    ModelTooLarge,
    NetworkUnavailable,
    RevisionNotFound,
)
from factscope.models.checkpoint import CONFIG, check_config, check_names, needed_names, read_config
from factscope.models.sources import BUNDLED, bundled_folder, shown

logger = logging.getLogger(__name__)
Value = TypeVar("Value")


class LoadProgress(Protocol):
    """Told how far a load is; may raise to cancel it."""

    def __call__(self, done: int, total: int, stage: str) -> None:
        """``done`` of ``total`` bytes (0 of 0 where there is nothing to count) of the ``stage`` in words."""


def silent(done: int, total: int, stage: str) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What the hub says of a model before anything is downloaded.

    Attributes:
        commit: the revision's commit.
        sizes: bytes of each file.
        counts: how many values the weights hold, by safetensors' name of the type; empty where the hub does not say.
    """

    commit: str
    sizes: Mapping[str, int]
    counts: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """What is known of a hub id: the hub's listing, or a folder in the cache with the reason why no more is known."""

    listing: Listing | None = None
    cached: Path | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LocalModel:
    """A model that can be loaded without the network.

    Attributes:
        name: what to pass to ``load``.
        bytes: what it takes on disk.
        usable: whether its files can be tried; ``reason`` says why not.
    """

    name: str
    revision: str
    bytes: int
    folder: Path
    usable: bool
    reason: str = ""


def look_up(repo: str, revision: str | None, *, seconds: float, local_only: bool = False) -> Lookup:
    """Ask the hub for a model, and the cache where the hub does not answer in time.

    Args:
        repo: the hub id.
        revision: branch, tag or commit; None is the default branch.
        seconds: how long the hub may take.
        local_only: whether to ask the cache alone.

    Raises:
        ModelNotFound, ModelGated, RevisionNotFound: the hub's answer.
        NetworkUnavailable: no answer, and not in the cache.
        ModelNotCached: the network is switched off, and not in the cache.
    """
    if local_only or huggingface_hub.is_offline_mode():
        return Lookup(cached=_require_cached(repo, revision, local_only=local_only))
    try:
        info = answer_within(
            seconds,
            lambda: _once_more(
                lambda: HfApi().model_info(repo, revision=revision, timeout=seconds, files_metadata=True)
            ),
        )
    except Exception as error:
        found = explain_hub_error(error, repo, revision)
        folder = cached_folder(repo, revision) if isinstance(found, NetworkUnavailable) else None
        if folder is None:
            raise found from error
        return Lookup(cached=folder, warnings=(f"{found.what}; the copy in the local cache is used",))
    sizes = {file.rfilename: int(file.size or 0) for file in info.siblings or ()}
    counts = dict(info.safetensors.parameters) if info.safetensors is not None else {}
    return Lookup(listing=Listing(commit=info.sha or "", sizes=sizes, counts=counts))


def answer_within(seconds: float, call: Callable[[], Value]) -> Value:
    """The result of a call that may take no longer than this; looking up a host's name has no time-out of its own.

    Raises:
        TimeoutError: there is no result yet. The call goes on in a daemon thread and its result is dropped.
    """
    results: queue.SimpleQueue[tuple[Value | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            results.put((call(), None))
        except BaseException as error:  # handed to the caller
            results.put((None, error))

    threading.Thread(target=work, name="factscope-hub", daemon=True).start()
    try:
        value, error = results.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} seconds") from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def fetch_config(repo: str, revision: str | None, listing: Listing, *, weights: bool, seconds: float) -> Path:
    """Check a listing and download config.json, which also tells whether the files may be had at all.

    Returns:
        The folder in the cache that belongs to the revision.

    Raises:
        FactScopeError: as ``look_up`` and ``checkpoint.inspect``.
    """
    check_names(_top(listing), shown(repo), weights=weights)
    folder = cached_folder(repo, listing.commit)
    if folder is None:
        try:
            path = answer_within(
                2 * seconds, lambda: _download(repo, CONFIG, revision or constants.DEFAULT_REVISION, seconds)
            )
        except Exception as error:
            raise explain_hub_error(error, repo, revision) from error
        folder = path.parent
    check_config(read_config(folder, shown(repo)), shown(repo))
    return folder


def _top(listing: Listing) -> tuple[str, ...]:
    return tuple(file for file in listing.sizes if "/" not in file)


def fetch_files(
    repo: str, folder: Path, listing: Listing, *, weights: bool, seconds: float, progress: LoadProgress
) -> None:
    """Download what is still missing of a model into its folder in the cache.

    Raises:
        ModelTooLarge: it does not fit on the disk.
        FactScopeError: as ``look_up``.
    """
    files = [file for file in needed_names(listing.sizes, weights=weights) if not (folder / file).exists()]
    total = sum(listing.sizes.get(file, 0) for file in files)
    if not files:
        return
    _refuse_full_disk(repo, total)
    watcher = Watcher(progress, total, f"downloading {repo}")
    try:
        for file in files:
            watcher.report()
            _download(repo, file, folder.name, seconds, watcher)
    except Exception as error:
        if watcher.stopped is not None:
            raise watcher.stopped from None
        raise explain_hub_error(error, repo, folder.name) from error


def _download(repo: str, file: str, revision: str, seconds: float, watcher: Watcher | None = None) -> Path:
    bar = watcher.bar if watcher is not None else _silent_bar
    path = _once_more(
        lambda: hf_hub_download(
            repo,
            file,
            revision=revision,
            etag_timeout=seconds,
            cache_dir=constants.HF_HUB_CACHE,
            tqdm_class=bar,  # type: ignore[arg-type]
        )
    )
    return Path(path)


def _once_more(call: Callable[[], Value], *, tries: int = 3) -> Value:
    """The result of a call, made again where its connection broke in the middle; a download goes on where it was.

    All threads share one client of the hub. When a connection is refused to one of them, the client closes it, and the
    answers that others are reading end with it.
    """
    for left in reversed(range(tries)):
        try:
            return call()
        except Exception as error:
            if not left or not _broke_in_the_middle(error):
                raise
            logger.debug("the connection to the hub broke, trying again", exc_info=True)
    raise AssertionError("unreachable")


def _broke_in_the_middle(error: BaseException) -> bool:
    """Whether a connection that stood was lost, or its client closed; a refused one, or silence, is no such case."""
    broken = ("ReadError", "WriteError", "CloseError", "RemoteProtocolError", "ClientClosed", "StreamClosed")
    return any(
        type(found).__name__ in broken or (isinstance(found, RuntimeError) and "closed" in str(found))
        for found in causes(error)
    )


class Watcher:
    """Adds up the bytes of several downloads for one ``LoadProgress``, and keeps what it raised."""

    def __init__(self, progress: LoadProgress, total: int, stage: str) -> None:
        self.stopped: BaseException | None = None
        self._progress, self._total, self._stage = progress, total, stage
        self._done = 0

    def report(self, more: int = 0) -> None:
        """Count more bytes and tell."""
        self._done += more
        try:
            self._progress(min(self._done, self._total), self._total, self._stage)
        except BaseException as error:
            self.stopped = error
            raise

    def bar(self, *args: Any, **options: Any) -> tqdm[Any]:
        """A progress bar as the hub's client wants one; it draws nothing."""
        watcher = self

        class Bar(tqdm):  # type: ignore[type-arg]
            def update(self, n: float | None = 1) -> bool | None:
                watcher.report(int(n or 0))
                return None

        return Bar(*args, **(options | {"disable": True}))


def _silent_bar(*args: Any, **options: Any) -> tqdm[Any]:
    return tqdm(*args, **(options | {"disable": True}))


def _refuse_full_disk(repo: str, needed: int) -> None:
    place = Path(constants.HF_HUB_CACHE)
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ModelTooLarge(
            f"downloading {shown(repo)} takes {needed / 1e9:.1f} GB and the cache has {free / 1e9:.1f} GB of disk free",
            "make room, or set HF_HOME to a larger disk",
        )


def cached_folder(repo: str, revision: str | None) -> Path | None:
    """The folder in the local cache that holds a revision's config.json, if there is one."""
    try:
        path = try_to_load_from_cache(repo, CONFIG, cache_dir=constants.HF_HUB_CACHE, revision=revision)
    except (OSError, ValueError):
        return None
    return Path(path).parent if isinstance(path, str) else None


def _require_cached(repo: str, revision: str | None, *, local_only: bool) -> Path:
    folder = cached_folder(repo, revision)
    if folder is not None:
        return folder
    of = f" at revision {shown(revision)}" if revision else ""
    why = "only local models are asked for" if local_only else "offline mode is on (HF_HUB_OFFLINE)"
    raise ModelNotCached(
        f"{shown(repo)}{of} is not in the local cache and {why}",
        "allow the network once to download it, or choose a cached model (see 'factscope models')",
    )


def causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and everything it was raised from or while handling."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        found = waiting.pop(0)
        if found is not None and id(found) not in seen:
            seen.add(id(found))
            yield found
            waiting.extend((found.__cause__, found.__context__))


def explain_hub_error(error: BaseException, repo: str, revision: str | None) -> FactScopeError:
    """The sentence for a failed request, found by the types of the exception and of its causes."""
    chain = tuple(causes(error))
    named = next((found for found in chain if isinstance(found, FactScopeError)), None)
    if named is not None:
        return named
    name = shown(repo)
    page = f"{constants.ENDPOINT}/{repo}"
    token = huggingface_hub.get_token() is not None
    # A gated repository is a kind of "not found" to the client, so it comes first.
    if any(isinstance(found, GatedRepoError) for found in chain):
        if token:
            return ModelGated(
                f"{name} is gated and the account of your token has no access", f"ask for access on {page}"
            )
        return ModelGated(f"{name} is gated", f"accept its terms on {page} and set HF_TOKEN to a token of that account")
    if any(isinstance(found, RevisionNotFoundError) for found in chain):
        return RevisionNotFound(
            f"{name} has no revision {shown(revision or 'main')}",
            f"see its branches, tags and commits on {page}/tree/main",
        )
    if any(isinstance(found, DisabledRepoError) for found in chain):
        return ModelNotFound(f"{name} has been disabled on the hub", "choose another model")
    status = _status(chain)
    if status == 401 and token and not _says_not_found(chain):
        return ModelGated(
            f"the hub does not accept your HF_TOKEN for {name}", "make a new token, or remove it for public models"
        )
    if any(isinstance(found, RepositoryNotFoundError) for found in chain):
        hint = "if it is private, use a token with access" if token else "if it is private, set HF_TOKEN"
        return ModelNotFound(f"{name} is not on the hub", f"check the spelling, and {hint}")
    if any(isinstance(found, HFValidationError) for found in chain):
        return ModelNotFound(f"{name} is not a hub id", "write 'owner/name'")
    if status is not None:
        return _explain_status(status, name, page)
    if any(isinstance(found, OfflineModeIsEnabled) for found in chain):
        return ModelNotCached(
            f"{name} is not in the local cache and offline mode is on (HF_HUB_OFFLINE)",
            "allow the network once to download it",
        )
    if any(isinstance(found, OSError) and found.errno == 28 for found in chain):
        return ModelTooLarge(
            f"the disk is full while downloading {name} to {constants.HF_HUB_CACHE}",
            "make room, or set HF_HOME to a larger disk",
        )
    if any(isinstance(found, PermissionError) for found in chain):
        return ModelFilesError(
            f"{name} cannot be stored: no permission to write {constants.HF_HUB_CACHE}",
            "set HF_HOME to a folder of yours",
        )
    if any(isinstance(found, TimeoutError) or "Timeout" in type(found).__name__ for found in chain):
        return NetworkUnavailable(
            f"the hub did not answer in time when asked for {name}", "try again, or use 'bundled' or a local folder"
        )
    return NetworkUnavailable(
        f"the hub cannot be reached to look for {name}", "check the network, or use 'bundled' or a local folder"
    )


def _explain_status(status: int, name: str, page: str) -> FactScopeError:
    if status == 429:
        return NetworkUnavailable(
            f"the hub limits how often it may be asked (429) and refused {name}", "wait a few minutes, or set HF_TOKEN"
        )
    if status >= 500:
        return NetworkUnavailable(
            f"the hub has a problem of its own ({status}) and cannot give {name}",
            "try again later, or use a local model",
        )
    if status in (401, 403):
        return ModelGated(
            f"the hub does not let you read {name} ({status})", f"set HF_TOKEN to a token that may, see {page}"
        )
    if status == 404:
        return ModelFilesError(f"a file of {name} is missing on the hub (404)", f"look at {page}/tree/main")
    return NetworkUnavailable(f"the hub refused {name} ({status})", "try again later")


def _status(chain: tuple[BaseException, ...]) -> int | None:
    """The HTTP status that the hub answered with, if it answered."""
    for found in chain:
        response = getattr(found, "response", None) if isinstance(found, HfHubHTTPError | EntryNotFoundError) else None
        if response is not None:
            return int(response.status_code)
    return None


def _says_not_found(chain: tuple[BaseException, ...]) -> bool:
    responses = (getattr(found, "response", None) for found in chain)
    return any(
        response is not None and response.headers.get("X-Error-Code") == "RepoNotFound" for response in responses
    )


def list_local_models() -> tuple[LocalModel, ...]:
    """The bundled model and what the hub's cache holds, with sizes; what cannot be read is left out."""
    found: list[LocalModel] = []
    folder = bundled_folder()
    if folder.is_dir():
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        found.append(_local(BUNDLED, "shipped", size, folder))
    try:
        cache = scan_cache_dir(constants.HF_HUB_CACHE)
    except (CacheNotFound, OSError, ValueError) as error:
        logger.debug("the hub's cache cannot be listed: %s", error)
        return tuple(found)
    for repo in sorted(cache.repos, key=lambda repo: repo.repo_id):
        if repo.repo_type == "model":
            for revision in sorted(repo.revisions, key=lambda revision: revision.commit_hash):
                refs = ", ".join(sorted(revision.refs)) or revision.commit_hash
                found.append(_local(repo.repo_id, refs, revision.size_on_disk, revision.snapshot_path))
    return tuple(found)


def _local(name: str, revision: str, size: int, folder: Path) -> LocalModel:
    from factscope.models.checkpoint import inspect

    try:
        inspect(folder, shown(name))
        reason = ""
    except FactScopeError as error:
        reason = str(error)
    except OSError as error:
        reason = f"its files cannot be read ({error.strerror})"
    return LocalModel(name=name, revision=revision, bytes=size, folder=folder, usable=not reason, reason=reason)
