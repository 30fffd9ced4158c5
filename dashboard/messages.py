"""What went wrong, in a sentence for the page. Text from users and models is shown as plain text, never as markup."""

from __future__ import annotations

import logging
import os
import re
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path

import streamlit as st

from dashboard import parts
from factscope.errors import FactScopeError

logger = logging.getLogger(__name__)
_LOG_BYTES = 2_000_000


def log_file() -> Path:
    """Where unexpected errors are written, for whoever runs the server."""
    folder = os.environ.get("FACTSCOPE_LOG_DIR")
    return Path(folder or tempfile.gettempdir()) / f"factscope-{os.getuid() if hasattr(os, 'getuid') else 0}.log"


def start_log() -> None:
    """Let everything from warnings up go to the log file."""
    root = logging.getLogger()
    if any(isinstance(handler, RotatingFileHandler) for handler in root.handlers):
        return
    try:
        handler = RotatingFileHandler(log_file(), maxBytes=_LOG_BYTES, backupCount=1, encoding="utf-8", delay=True)
    except OSError:
        return  # the console still has it
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.addHandler(handler)


def sentence(error: BaseException) -> str:
    """What the page says about an error: its own sentence, or ours with an id to find it in the log."""
    if isinstance(error, FactScopeError):
        return capitalised(str(error))
    known = getattr(error, "_factscope_id", None)
    if known is None:
        known = uuid.uuid4().hex[:8]
        error._factscope_id = known  # type: ignore[attr-defined]
        logger.error("error %s on a page", known, exc_info=error)
    return f"Something went wrong that should not have: error {known}. Please report it with what {log_file()} says."


def capitalised(text: str) -> str:
    """A sentence with a capital, unless it opens with a name such as ``facts.csv``, which is quoted as it is."""
    return text[:1].upper() + text[1:] if re.match(r"[a-z]+ ", text) else text


def show_error(error: BaseException) -> None:
    """Show an error where its figure would be."""
    parts.note("bad", [sentence(error)])


def show_warnings(warnings: Sequence[str]) -> None:
    """Show warnings, each once."""
    if warnings:
        parts.note("warn", [capitalised(text) for text in dict.fromkeys(warnings)])


@contextmanager
def caught() -> Iterator[None]:
    """Turn an error inside into its sentence. What Streamlit raises to steer the script is no Exception and passes."""
    try:
        yield
    except Exception as error:
        show_error(error)


def on_script_error(error: Exception) -> bool:
    """For ``st.App``: our own text instead of a traceback."""
    st.error(sentence(error).replace("`", "'"), icon=":material/error:")
    return True
