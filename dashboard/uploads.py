"""Files of a visitor that experiments read: text about subjects. On disk while the session lasts, never in a link."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import streamlit as st

from dashboard.link import AttributeSource
from factscope.datasets import MAX_BYTES
from factscope.datasets.attributes import BUNDLED, SUFFIXES
from factscope.errors import DatasetError

MAX_FILES = 200
_TABLE, _TEXTS = "your table", "your texts"
_LONGEST_NAME = 60
_LABELS: dict[AttributeSource, str] = {"table": "A CSV file: subject, paragraphs", "texts": "Text files, all at once"}


@st.cache_resource(scope="session", show_spinner=False, on_release=lambda folder: folder.cleanup())
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="factscope-upload-")


def folder() -> str:
    """Where files of this session lie while it lasts."""
    return _folder().name


def attributes(source: AttributeSource) -> str | None:
    """What an experiment is given as its source of attributes; None as long as the file is missing.

    Raises:
        DatasetError: the files are too large or too many.
    """
    if source == "bundled":
        return BUNDLED
    several = source == "texts"
    given = st.file_uploader(
        _LABELS[source],
        type=["csv"] if source == "table" else [suffix.removeprefix(".") for suffix in SUFFIXES],
        accept_multiple_files=several,
        key=f"attributes-{source}",
        help="At most 5 MB. It stays on this server while the page is open, and is not in the link.",
    )
    files = [] if given is None else [*given] if isinstance(given, list) else [given]
    return _kept(files, several) if files else None


def text(label: str, key: str) -> str | None:
    """Where a visitor's text lies; None as long as it is missing.

    Raises:
        DatasetError: it is too large.
    """
    given = st.file_uploader(
        label,
        type=[suffix.removeprefix(".") for suffix in SUFFIXES],
        key=key,
        help="At most 5 MB. It stays on this server while the page is open, and is not in the link.",
    )
    if given is None:
        return None
    content = given.getvalue()
    if len(content) > MAX_BYTES:
        raise DatasetError(f"this text has more than {MAX_BYTES:,} bytes", "give a smaller one")
    place = Path(_folder().name) / hashlib.sha256(content).hexdigest()[:16]
    place.mkdir(exist_ok=True)
    path = place / _plain_name(str(given.name), ".txt")
    if not path.exists():
        path.write_bytes(content)
    return str(path)


def _kept(files: Sequence[Any], several: bool) -> str:
    """Where the content lies; the same content always in the same place."""
    contents = [(Path(str(file.name)).name, file.getvalue()) for file in files]
    if sum(len(content) for _, content in contents) > MAX_BYTES or len(contents) > MAX_FILES:
        raise DatasetError(
            f"these {len(contents)} files have more than {MAX_BYTES:,} bytes, or are more than {MAX_FILES}",
            "give fewer or smaller ones",
        )
    digest = hashlib.sha256()
    for name, content in contents:
        digest.update(f"{name} {len(content)} ".encode("utf-8", "surrogatepass") + content)
    table = _plain_name(contents[0][0])
    place = Path(_folder().name) / digest.hexdigest()[:16] / _TEXTS
    if not place.exists():
        place.mkdir(parents=True)
        for i, (_, content) in enumerate(contents):
            (place / (f"{i}.txt" if several else table)).write_bytes(content)
    return str(place if several else place / table)


def _plain_name(name: str, suffix: str = ".csv") -> str:
    """The name of a visitor's file, by which errors call it: letters, digits and a few marks, nothing else."""
    stem = re.sub(r"[^\w ()+-]+", "_", Path(name).stem)[:_LONGEST_NAME].strip(" _")
    return f"{stem or _TABLE}{suffix}"
