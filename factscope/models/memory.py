"""How much memory a model will take, before a weight is read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from factscope.models.checkpoint import DTYPE_BYTES

logger = logging.getLogger(__name__)

WORKING_SHARE = 0.10
"""What activations, caches and copies made while loading take on top of the weights, as a share of them."""
WORKING_BYTES = 200_000_000
"""And whatever the size of the model."""
_CHOSEN_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
_FLOATS = ("F64", "F32", "F16", "BF16")
_UNLIMITED = 1 << 60


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """What a model needs and what is free.

    Attributes:
        parameters: number of weights.
        bytes_weights: what they take in the chosen type.
        bytes_total_needed: with what one computation takes beside them.
        bytes_free: what the device has left for this process.
        fits: whether it does.
        sentence: all of it in words.
    """

    parameters: int
    bytes_weights: int
    bytes_total_needed: int
    bytes_free: int
    fits: bool
    sentence: str


def estimate(name: str, counts: Mapping[str, int], dtype: str, device: str) -> MemoryEstimate:
    """The estimate for so many values of each stored type.

    Args:
        name: how the sentence calls the model, in quotes.
        counts: values by safetensors' name of their type.
        dtype: what floating-point values become; ``auto`` leaves them.
        device: ``cpu``, or a GPU as torch names it.
    """
    parameters = sum(counts.values())
    weights = sum(count * _bytes(stored, dtype) for stored, count in counts.items())
    needed = int(weights * (1 + WORKING_SHARE)) + WORKING_BYTES
    free = free_bytes(device)
    kind = f"in {dtype}" if dtype != "auto" else "as stored"
    place = "" if device == "cpu" else f" on {device}"
    fits = needed <= free
    sentence = (
        f"{name} has {_count(parameters)} parameters, {_size(weights)} {kind}; with working memory it takes about "
        f"{_size(needed)}, and {_size(free)} are free{place}"
    )
    return MemoryEstimate(
        parameters=parameters,
        bytes_weights=weights,
        bytes_total_needed=needed,
        bytes_free=free,
        fits=fits,
        sentence=sentence + ("" if fits else ": it does not fit"),
    )


def _bytes(stored: str, dtype: str) -> int:
    own = DTYPE_BYTES.get(stored.upper(), 1)
    return _CHOSEN_BYTES.get(dtype, own) if stored.upper() in _FLOATS else own


def _count(number: int) -> str:
    if number >= 1e9:
        return f"{number / 1e9:.1f} billion"
    return f"{number / 1e6:.1f} million" if number >= 1e6 else f"{number:,}"


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def free_bytes(device: str) -> int:
    """What this process may still take on a device, limits of its container included."""
    if device != "cpu":
        free, _total = torch.accelerator.get_memory_info(torch.device(device))
        return int(free)
    return min(int(psutil.virtual_memory().available), container_free())


def container_free(root: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> int:
    """What the control groups of this process leave it; a very large number where nothing is limited."""
    try:
        lines = [line.split(":", 2) for line in process.read_text().splitlines()]
    except OSError:
        return _UNLIMITED
    free = _UNLIMITED
    for _number, controllers, path in (line for line in lines if len(line) == 3):
        if controllers == "":
            free = min(free, _group_free(root, path, "memory.max", "memory.current", "inactive_file"))
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            free = min(free, _group_free(root / "memory", path, *names))
    return free


def _group_free(root: Path, path: str, limit_name: str, usage_name: str, reclaimable_name: str) -> int:
    """The tightest limit of a group and of the groups around it, less what is used."""
    free = _UNLIMITED
    group = root / path.lstrip("/")
    for folder in (group, *group.parents):
        if folder != root and root not in folder.parents:
            break
        try:
            limit = (folder / limit_name).read_text().strip()
            if not limit.isdigit() or int(limit) >= _UNLIMITED:
                continue
            used = int((folder / usage_name).read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            free = min(free, max(0, int(limit) - used + int(statistics.get(reclaimable_name, 0))))
        except (OSError, ValueError) as error:
            logger.debug("no memory limit in %s: %s", folder, error)
    return free
