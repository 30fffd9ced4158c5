"""What a model name means: the bundled model, a hub id, a local folder, or random weights of one of these.

Nothing is read here but whether a path exists; names that can be none of these are refused with the reason.
"""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from factscope.errors import ModelError, ModelNotFound, RevisionNotFound
from factscope.settings import Settings

BUNDLED = "bundled"
RANDOM_PREFIX = "random:"
LONGEST_NAME = 1024
_EXAMPLES = "give 'bundled', a hub id such as 'openai-community/gpt2', or a folder"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: the name as given.
        repo: the hub id; None for a folder.
        folder: the local folder; None for a hub id.
        seed: of the random weights; None for the weights that are there.
    """

    name: str
    repo: str | None = None
    folder: Path | None = None
    seed: int | None = None

    @property
    def shown(self) -> str:
        """The name in quotes, short enough for a sentence."""
        return shown(self.name)


def shown(value: object, longest: int = 100) -> str:
    """A value as a person may read it: quoted, escaped, cut."""
    text = value if isinstance(value, str) else repr(value)
    return repr(text) if len(text) <= longest else f"{text[: longest - 20]!r}... ({len(text):,} characters)"


def folder_state(name: str) -> str:
    """Sixteen hex digits that change when a file of a local folder does; empty for a hub id.

    Sizes and times tell; contents are not read. ``random:`` in front of a name changes nothing of its files.
    """
    base = name.removeprefix(RANDOM_PREFIX)
    folder = bundled_folder() if base == BUNDLED else Path(base).expanduser()
    try:
        if not folder.is_dir():
            return ""
        found = sorted((p.name, (s := p.stat()).st_size, s.st_mtime_ns) for p in folder.iterdir() if p.is_file())
    except (OSError, ValueError, RuntimeError):
        return ""
    return hashlib.sha256(repr(found).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def bundled_folder() -> Path:
    """Where the model lies that FactScope ships."""
    return Path(__file__).resolve().parents[1] / "demo" / "model"


def parse_name(name: str, *, revision: str | None = None, settings: Settings) -> Source:
    """Decide what a model name means.

    Args:
        name: ``bundled``, a hub id, a folder, or ``random:NAME`` or ``random:NAME:SEED``.
        revision: only to refuse it where there is none to choose.
        settings: whether all names are allowed.

    Raises:
        ModelNotFound: the name is empty, no name at all, or a path without a folder.
        RevisionNotFound: the revision is not text, or the model has no revisions.
        ModelError: this installation does not allow the name.
    """
    _refuse_odd_text(name)
    base, seed = _split_random(name)
    _refuse_forbidden(base, name, revision, settings)
    source = _locate(name, base, seed)
    if revision is not None:
        _refuse_odd_revision(source, revision)
    return source


def _refuse_odd_text(name: str) -> None:
    if not name.strip():
        raise ModelNotFound("the model name is empty", _EXAMPLES)
    control = next((letter for letter in name if unicodedata.category(letter) in ("Cc", "Cs")), None)
    if control is not None:
        raise ModelNotFound(
            f"the model name {shown(name)} contains the control character U+{ord(control):04X}", _EXAMPLES
        )
    if len(name) > LONGEST_NAME:
        raise ModelNotFound(f"the model name {shown(name)} is too long to be an id or a folder", _EXAMPLES)


def _split_random(name: str) -> tuple[str, int | None]:
    """``random:NAME:SEED`` as NAME and SEED; the seed is 0 where none is given."""
    if not name.startswith(RANDOM_PREFIX):
        return name, None
    base, _, seed = name.removeprefix(RANDOM_PREFIX).rpartition(":")
    if base and seed.isascii() and seed.isdigit() and int(seed) < 2**63:
        return base, int(seed)
    rest = name.removeprefix(RANDOM_PREFIX)
    if not rest.strip() or rest.startswith(RANDOM_PREFIX):
        raise ModelNotFound(
            f"{shown(name)} does not say which model to randomise", "write 'random:NAME' or 'random:NAME:SEED'"
        )
    if base and "/" not in seed and not Path(rest).exists():
        raise ModelNotFound(
            f"{shown(seed)} in {shown(name)} is not a seed", "write a whole number from 0, or leave it out"
        )
    return rest, 0


def _refuse_forbidden(base: str, name: str, revision: str | None, settings: Settings) -> None:
    allowed = settings.models_allowed
    if allowed is not None and revision is not None:
        raise ModelError(
            f"the revision {shown(revision)} of {shown(name)} is not offered here", "leave the revision out"
        )
    if allowed is not None and name not in allowed and not (base in allowed and name in (base, RANDOM_PREFIX + base)):
        choice = ", ".join(allowed) or "none"
        raise ModelError(f"the model {shown(name)} is not offered here", f"choose one of: {choice}")


def _locate(name: str, base: str, seed: int | None) -> Source:
    if base == BUNDLED:
        folder = bundled_folder()
        if not folder.is_dir():
            raise ModelNotFound(
                "the model 'bundled' is not part of this installation (factscope/demo/model is missing)",
                "install FactScope again, or make it with 'python -m factscope.demo.train'",
            )
        return Source(name=name, folder=folder, seed=seed)
    if "://" in base:
        raise ModelNotFound(f"the model name {shown(base)} is an address", "give the id alone, 'owner/name'")
    path = _path(base)
    found = _kind(path)
    if found == "folder":
        return Source(name=name, folder=path.resolve(), seed=seed)
    if found == "file":
        raise ModelNotFound(
            f"{shown(base)} is a file, not a folder", "give the folder that contains config.json and the weights"
        )
    if path.is_absolute() or base.startswith((".", "~")) or base.count("/") > 1 or "\\" in base:
        raise ModelNotFound(
            f"there is no folder {shown(base)}", "check the path, or give a hub id such as 'openai-community/gpt2'"
        )
    try:
        validate_repo_id(base)
    except HFValidationError:
        raise ModelNotFound(
            f"{shown(base)} is neither a folder nor a hub id (letters, digits, '-', '_', '.', one '/', 96 characters)",
            _EXAMPLES,
        ) from None
    return Source(name=name, repo=base, seed=seed)


def _path(base: str) -> Path:
    try:
        return Path(base).expanduser()
    except RuntimeError:  # the home folder of nobody known
        return Path(base)


def _kind(path: Path) -> str:
    """``folder``, ``file`` or ``nothing``; a path that the system cannot look up is nothing."""
    try:
        return "folder" if path.is_dir() else "file" if path.exists() else "nothing"
    except (OSError, ValueError):
        return "nothing"


def _refuse_odd_revision(source: Source, revision: str) -> None:
    if source.folder is not None:
        raise RevisionNotFound(
            f"the revision {shown(revision)} cannot be chosen: {source.shown} is a folder and has no revisions",
            "leave the revision out",
        )
    odd = any(unicodedata.category(letter) in ("Cc", "Cs", "Zs") for letter in revision)
    if not revision or odd or len(revision) > 250 or ".." in revision or revision.startswith("/"):
        raise RevisionNotFound(
            f"{shown(revision)} is not a revision of {source.shown}",
            "give a branch, a tag or a commit, or leave it out",
        )
