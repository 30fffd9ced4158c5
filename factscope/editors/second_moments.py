"""How keys vary: the second moment ``C = E[k k']`` of what a down-projection is given, uncentred.

Source: Meng et al. 2022 (arXiv 2202.05262), section 3.1 and appendix E; the released code's statistics files.

A key that text seldom produces can be given a new value without moving others: both ROME and MEMIT weigh directions by
``C^-1``. Four places where it can come from:

- shipped with the bundled model, with the text it was collected from;
- collected from text for this very model, layer and precision (``collecting``);
- a file of ROME's or MEMIT's: ``.npz`` with ``mom2.mom2``, the sum of ``k k'``, and ``mom2.count``, the tokens;
- ``identity``: every direction weighs the same. This is an alternative, not an estimate, and is labelled so.

``C`` of fewer tokens than it has rows is singular; then, and wherever the Cholesky decomposition fails, a ridge is
added, a share of the mean of the diagonal, and stated.
"""

from __future__ import annotations

import io
import json
import lzma
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from factscope.errors import DatasetError, ModelFilesError, SpecError
from factscope.models.handle import ModelHandle
from factscope.settings import get_settings

IDENTITY = "identity"
AUTO = "auto"
RIDGES = (0.0, 1e-8, 1e-6, 1e-4, 1e-2)
"""Shares of the mean of the diagonal that are tried in turn, until the matrix can be decomposed."""
FEW_TOKENS_RIDGE = 1e-4
"""What is added at least where there are fewer tokens than rows."""
TENSOR = "second_moment"


@dataclass(frozen=True, kw_only=True, eq=False)
class SecondMoment:
    """``C`` of one layer.

    Attributes:
        matrix: None for the identity.
        n_tokens: over which the mean was taken; 0 where the file does not say.
        origin: where it comes from, in words. ``key``: what identifies it.
    """

    layer: int
    matrix: Float[Tensor, "d_in d_in"] | None
    n_tokens: int
    origin: str
    key: str


class Moments:
    """Second moments of some layers, decomposed when they are first needed.

    Args:
        moments: by layer.
        device: where their decompositions are computed; the CPU holds them in float64.
    """

    def __init__(self, moments: Mapping[int, SecondMoment]) -> None:
        self._moments = dict(moments)
        self._factors: dict[int, tuple[Tensor | None, float]] = {}

    def solve(self, layer: int, keys: Tensor) -> Tensor:
        """``C^-1 k`` in float64, for one key or a column each."""
        factor, _ = self._factor(layer)
        if factor is None:
            return keys.double()
        columns = keys.double().cpu()
        shaped = columns[:, None] if columns.dim() == 1 else columns
        return torch.cholesky_solve(shaped, factor).reshape(columns.shape).to(keys.device)

    def solve_with(self, layer: int, keys: Float[Tensor, "d_in fact"], covariance: float) -> Tensor:
        """``(lambda C + K K')^-1 K`` in float64, by ``C^-1 K (lambda + K' C^-1 K)^-1``."""
        found = self.solve(layer, keys)
        inner = keys.double().T @ found
        inner = inner + covariance * torch.eye(inner.shape[0], dtype=inner.dtype, device=inner.device)
        return torch.linalg.solve(inner, found, left=False)

    def told(self, layer: int) -> dict[str, Any]:
        """Provenance, as plain values."""
        moment = self._moments[layer]
        found: dict[str, Any] = {
            "layer": layer,
            "origin": moment.origin,
            "key": moment.key,
            "tokens": moment.n_tokens,
        }
        ridge = self._factor(layer)[1]
        return {**found, "ridge": ridge} if ridge else found

    def warnings(self) -> tuple[str, ...]:
        """What should be told beside an edit."""
        said = []
        for layer, moment in self._moments.items():
            ridge = self._factor(layer)[1]
            if moment.matrix is None:
                said.append(f"Layer {layer}: no statistics of keys were used (identity), every direction weighs alike.")
            elif ridge:
                said.append(
                    f"Layer {layer}: the second moment of {moment.n_tokens:,} tokens is singular; {ridge:g} of the "
                    "mean of its diagonal was added."
                )
        return tuple(said)

    def _factor(self, layer: int) -> tuple[Tensor | None, float]:
        if layer not in self._factors:
            moment = self._moments[layer]
            self._factors[layer] = (None, 0.0) if moment.matrix is None else _decomposed(moment.matrix, moment.n_tokens)
        return self._factors[layer]


def _decomposed(matrix: Tensor, n_tokens: int) -> tuple[Tensor, float]:
    """The Cholesky factor, and the ridge that it took."""
    exact = matrix.double().cpu()
    exact = (exact + exact.T) / 2
    unit = float(exact.diagonal().mean())
    few = 0 < n_tokens < matrix.shape[0]
    for ridge in RIDGES:
        if few and ridge < FEW_TOKENS_RIDGE:
            continue
        raised = exact.clone()
        raised.diagonal().add_(ridge * unit)
        factor, failed = torch.linalg.cholesky_ex(raised)
        if not int(failed):
            return factor, ridge
    raise DatasetError("the second moment is not a covariance: it cannot be decomposed", "collect it anew")


# ------------------------------------------------------------------------------------------------ where it comes from


def moments_for(model: ModelHandle, layers: Sequence[int], statistics: str) -> Moments:
    """The second moments that a spec names.

    Raises:
        SpecError: nothing is there for this model; says how to make it.
        DatasetError: a file cannot be used, or is of another model.
    """
    name = statistics.strip()
    if name == IDENTITY:
        return Moments({layer: _identity(layer) for layer in layers})
    if name != AUTO:
        return Moments({layer: read_file(model, Path(name), layer, alone=len(layers) == 1) for layer in layers})
    found = {layer: _shipped(model, layer) or _collected(model, layer) for layer in layers}
    missing = [layer for layer, moment in found.items() if moment is None]
    if missing:
        raise SpecError(
            f"there are no statistics of keys for {model.info.name}, layer {', '.join(map(str, missing))}",
            _instead(model.info.name, missing),
        )
    return Moments({layer: moment for layer, moment in found.items() if moment is not None})


def _instead(name: str, missing: Sequence[int]) -> str:
    """What can be done without statistics; those of a model that has learned nothing are not worth collecting."""
    if name.startswith("random:"):
        return "statistics of random weights are of no use: choose identity, or edit it with ft"
    return (
        f"collect them from text with 'factscope statistics --model {name} --layers {','.join(map(str, missing))} "
        "--text FILE', import a published file, or choose identity"
    )


def missing_layers(model: ModelHandle, layers: Sequence[int], statistics: str = AUTO) -> tuple[int, ...]:
    """Layers for which there is nothing, where what ships or was collected is asked for; no collected file is read."""
    if statistics.strip() != AUTO:
        return ()
    known = {e.layer for e in stored() if (e.weights, e.dtype) == (original_weights(model), model.info.dtype)}
    return tuple(layer for layer in layers if layer not in known and _shipped(model, layer) is None)


def _identity(layer: int) -> SecondMoment:
    return SecondMoment(layer=layer, matrix=None, n_tokens=0, origin="identity, no statistics", key=IDENTITY)


def _shipped(model: ModelHandle, layer: int) -> SecondMoment | None:
    """The bundled model's; None for any other weights."""
    from factscope.demo import second_moments as shipped

    found = shipped.read(original_weights(model), layer)
    if found is None:
        return None
    matrix, n_tokens, origin = found
    return SecondMoment(layer=layer, matrix=matrix, n_tokens=n_tokens, origin=origin, key="bundled")


def _collected(model: ModelHandle, layer: int) -> SecondMoment | None:
    """Of those collected for this model and layer the one with most tokens."""
    entries = [entry for entry in stored() if entry.weights == original_weights(model) and entry.layer == layer]
    entries = [entry for entry in entries if entry.dtype == model.info.dtype]
    if not entries:
        return None
    best = max(entries, key=lambda entry: entry.n_tokens)
    with safe_open(best.path, framework="pt") as file:
        matrix = file.get_tensor(TENSOR)
    return SecondMoment(layer=layer, matrix=matrix, n_tokens=best.n_tokens, origin=best.origin, key=best.key)


def original_weights(model: ModelHandle) -> str:
    """Fingerprint of the weights without edits, to which statistics belong."""
    return model.original.info.weights


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One collected second moment on disk.

    Attributes:
        model, revision, dtype, weights: whose.
        corpus: hash of the text. ``origin``: it in words.
    """

    path: Path
    key: str
    model: str
    revision: str
    dtype: str
    weights: str
    layer: int
    corpus: str
    origin: str
    n_tokens: int
    n_bytes: int

    def row(self) -> dict[str, Any]:
        """As a list shows it."""
        return {
            "key": self.key,
            "model": self.model,
            "revision": self.revision,
            "dtype": self.dtype,
            "layer": self.layer,
            "tokens": self.n_tokens,
            "origin": self.origin,
            "size_mb": round(self.n_bytes / 1e6, 1),
        }


def folder() -> Path:
    """Where collected second moments are kept."""
    return get_settings().cache_dir / "second_moments"


def stored() -> tuple[Stored, ...]:
    """What was collected so far; files that are none of ours are passed over."""
    found = []
    for path in sorted(folder().glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                told = json.loads((file.metadata() or {})["factscope"])
            fields = {name: told[name] for name in _KEPT}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            continue
        found.append(Stored(path=path, key=path.stem, n_bytes=path.stat().st_size, **fields))
    return tuple(found)


_KEPT = ("model", "revision", "dtype", "weights", "layer", "corpus", "origin", "n_tokens")


def read_file(model: ModelHandle, path: Path, layer: int, *, alone: bool = True) -> SecondMoment:
    """A published ``.npz`` or a file of ours, for one layer.

    Args:
        alone: a file holds one layer; with more, the path must have ``{layer}`` in it.

    Raises:
        SpecError: several layers and one file.
        DatasetError: it cannot be read, says that it is of other weights, of another type or another layer, or has
            another width than this layer's keys. A published file says none of these but the width.
    """
    if not alone and "{layer}" not in str(path):
        raise SpecError(
            f"statistics {str(path)[:80]!r} is one file, and several layers are edited",
            "write {layer} where the file names have the layer's number",
        )
    place = Path(str(path).replace("{layer}", str(layer)))
    width = down_width(model, layer)
    if place.suffix == ".npz":
        matrix, count = _npz(model, place, layer, width)
    else:
        matrix, count = _safetensors(model, place, layer)
        _refuse_unless_square(model, place, layer, width, tuple(matrix.shape))
    if not bool(torch.isfinite(matrix).all()):
        raise DatasetError(f"{place.name!r} holds values that are not finite", "collect the statistics anew")
    return SecondMoment(
        layer=layer, matrix=matrix, n_tokens=count, origin=f"the file {place.name}, {count:,} tokens", key=place.name
    )


def _refuse_unless_square(model: ModelHandle, path: Path, layer: int, width: int, shape: tuple[int, ...]) -> None:
    if shape != (width, width):
        raise DatasetError(
            f"{path.name!r} holds a matrix of {' x '.join(map(str, shape))[:80]}, and the keys of layer {layer} of "
            f"{model.info.name} have {width} numbers",
            "use the statistics of this model",
        )


_UNREADABLE = (
    OSError, KeyError, ValueError, TypeError, EOFError, AttributeError, ArithmeticError, MemoryError, RuntimeError,
    SyntaxError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, tokenize.TokenError,
)  # fmt: skip
"""What damaged archives and array headers make of zipfile and NumPy."""
_HEADER_BYTES = 16_384


def _npz(model: ModelHandle, path: Path, layer: int, width: int) -> tuple[Tensor, int]:
    """The sum of ``k k'`` over the number of tokens, from a file of ROME's or MEMIT's.

    What the arrays' headers say is checked before any of their numbers are read: a small file can claim, and unpack
    to, more than there is memory.
    """
    try:
        with zipfile.ZipFile(path) as data:
            counts, kind = _array_header(data, "mom2.count")
            if kind not in "iuf" or counts != ():
                raise ValueError("mom2.count is no number")
            count = int(_array(data, "mom2.count"))
            if not 1 <= count < 2**53:
                raise ValueError("mom2.count is no positive number of tokens")
            shape, kind = _array_header(data, "mom2.mom2")
            if kind != "f" or len(shape) != 2:
                raise ValueError("mom2.mom2 is no matrix of numbers")
            total = _array(data, "mom2.mom2") if shape == (width, width) else None
    except _UNREADABLE as error:
        raise DatasetError(
            f"{path.name!r} cannot be read as statistics ({str(error) or type(error).__name__})"[:300],
            "give an .npz file of ROME or MEMIT with mom2.mom2 and mom2.count",
        ) from error
    if total is None:
        _refuse_unless_square(model, path, layer, width, shape)
    with np.errstate(over="ignore"):  # what is too large for float32 is refused as not finite
        return torch.from_numpy(np.asarray(total).astype(np.float32)) / count, count


def _array_header(data: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], str]:
    """Shape and kind of number that an array of the archive claims; no more than its header is unpacked."""
    with data.open(f"{name}.npy") as file:
        begin = io.BytesIO(file.read(_HEADER_BYTES))
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, _, dtype = readers[np.lib.format.read_magic(begin)](begin)
    return tuple(shape), dtype.kind


def _array(data: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array whose header was checked; read to the end of its entry, where the checksum is compared."""
    with data.open(f"{name}.npy") as file:
        found = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):
            raise ValueError(f"{name} holds more than its header says")
    return found


def _safetensors(model: ModelHandle, path: Path, layer: int) -> tuple[Tensor, int]:
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {})["factscope"])
            matrix, count = file.get_tensor(TENSOR), int(told["n_tokens"])
            of_layer, weights, dtype = int(told["layer"]), str(told["weights"]), str(told["dtype"])
            name = str(told["model"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise DatasetError(
            f"{path.name!r} cannot be read as statistics ({error})"[:300], "give a file that 'statistics' has made"
        ) from error
    mine = model.original.info
    if (weights, dtype) != (original_weights(model), mine.dtype):
        raise DatasetError(
            f"{path.name!r} is of {name[:80]!r} ({dtype[:20]}, weights {weights[:20]}), and this is {mine.name} "
            f"({mine.dtype}, weights {mine.weights})",
            "give the statistics of this model in this type, or collect them",
        )
    if of_layer != layer:
        raise DatasetError(f"{path.name!r} is of layer {of_layer}, not {layer}", "give the file of this layer")
    return matrix.float(), count


def down_width(model: ModelHandle, layer: int) -> int:
    """How many numbers a key of this layer has.

    Raises:
        ModelFilesError: the down-projection tells no shape.
    """
    module: Any = model.parts.wiring.down_projection[layer]
    for name in ("in_features", "nx"):
        if isinstance(width := getattr(module, name, None), int):
            return width
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 2:
        return int(weight.shape[0])
    raise ModelFilesError(f"the down-projection of layer {layer} of {model.info.name} tells no shape")
