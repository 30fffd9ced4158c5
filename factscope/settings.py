"""Configuration: from the environment, and from a file that the environment names.

Every field can be set as ``FACTSCOPE_<FIELD>``; ``FACTSCOPE_SETTINGS_FILE`` names a file of such lines. Whoever needs a
setting calls ``get_settings()`` or is handed the frozen object. It is read anew when the environment or the file is
another: reading takes milliseconds, and every prompt asks.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from factscope.errors import SpecError

PREFIX = "FACTSCOPE_"


def _default_threads() -> int:
    """All processors that this process may use but one, which is left to the page."""
    return max(1, len(os.sched_getaffinity(0)) - 1 if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 2) - 1)


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "factscope"


class Settings(BaseSettings):
    """What whoever runs FactScope may choose.

    Attributes:
        models_allowed: on a public address the only model names that can be asked for, folders never; None allows all.
            In the environment: names separated by commas.
        max_models: how many models stay in memory.
        torch_threads: threads that one computation may use.
        max_prompt_tokens: the longest prompt, in tokens.
        max_prompt_chars: the longest prompt, in characters.
        cache_dir: folder for FactScope's own files. Models of the hub stay where huggingface_hub puts them (HF_HOME).
        hub_timeout_seconds: how long the hub may take to answer before the local cache is used.
        device: where models run; ``auto`` takes a GPU if there is one.
        edits_mib: memory in MiB that one visitor's edits may take on the dashboard. edits_mib_in_all: those of all.
        renderer: how figures are drawn in the browser.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore", env_ignore_empty=True)

    models_allowed: Annotated[tuple[str, ...] | None, NoDecode] = None
    max_models: int = Field(default=2, ge=1, le=64)
    torch_threads: int = Field(default_factory=_default_threads, ge=1, le=1024)
    max_prompt_tokens: int = Field(default=256, ge=1)
    max_prompt_chars: int = Field(default=4000, ge=1)
    cache_dir: Path = Field(default_factory=_default_cache)
    hub_timeout_seconds: float = Field(default=5.0, gt=0, le=600)
    device: str = Field(default="auto", min_length=1)
    edits_mib: int = Field(default=256, ge=1)
    edits_mib_in_all: int = Field(default=2048, ge=1)
    renderer: Literal["canvas", "svg"] = "canvas"

    @field_validator("models_allowed", mode="before")
    @classmethod
    def _split_names(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(name.strip() for name in value.split(",") if name.strip())
        return value


def get_settings() -> Settings:
    """The settings as the environment says now.

    Raises:
        SpecError: a variable has a value that cannot be used, or the named file does not exist.
    """
    file = os.environ.get(f"{PREFIX}SETTINGS_FILE") or None
    if file and not Path(file).is_file():
        raise SpecError(f"{PREFIX}SETTINGS_FILE={file[:80]!r} is not a file", "correct the variable or remove it")
    state = Path(file).stat() if file else None
    said = tuple(sorted((n, v) for n, v in os.environ.items() if n.upper().startswith(PREFIX) or n in _OF_DEFAULTS))
    return _read(file, said, None if state is None else (state.st_mtime_ns, state.st_size), _default_threads())


_OF_DEFAULTS = ("HOME", "XDG_CACHE_HOME")
"""What defaults are made of, besides the processors."""


@lru_cache(maxsize=8)
def _read(file: str | None, said: tuple[tuple[str, str], ...], state: tuple[int, int] | None, threads: int) -> Settings:
    """The settings of one environment, all of which is in the arguments."""
    try:
        return Settings(_env_file=file)  # type: ignore[call-arg]
    except UnicodeDecodeError:
        raise SpecError(
            f"{PREFIX}SETTINGS_FILE={file!r} is not a text file", "correct the variable or remove it"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        name = PREFIX + "_".join(str(part) for part in first["loc"]).upper()
        raise SpecError(
            f"{name}={str(first['input'])[:80]!r} cannot be used: {first['msg'][:1].lower()}{first['msg'][1:]}",
            "correct the variable or remove it",
        ) from None
