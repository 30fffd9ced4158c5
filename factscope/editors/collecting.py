"""Collect second moments of keys from text: what it will cost, the collection itself, and what was collected.

Source: Meng et al. 2022 (arXiv 2202.05262), appendix E.3: ``k k'`` over the tokens of an encyclopedia. Here of any
text.

1. A corpus is a file, a folder of .txt and .md files, or a list of texts; a file's texts are its paragraphs, parted by
   empty lines. With ``n_texts`` so many are drawn, in a seeded order.
2. Each text is tokenized as the model does it, and cut at the longest prompt that the model takes.
3. Batches of texts of like length go through the model up to the highest layer asked for; at every token that is
   neither padding nor special the down-projection's input k is read. ``k k'`` is summed in float32 within a batch and
   in float64 over batches. No edit is on.
4. The sum over the number of tokens is kept under a key of model, revision, type, weights, layer, corpus and sample.

A collection that was stopped goes on where it was, if it is asked for again; its sums are saved every half minute and
when it is stopped. Nothing here starts by itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from factscope.datasets.attributes import SUFFIXES, split_paragraphs
from factscope.datasets.files import content_of, decoded, printable
from factscope.editors.edit import refuse_unless_it_has
from factscope.editors.second_moments import TENSOR, Stored, down_width, folder, read_file, stored
from factscope.errors import DatasetError, SpecError
from factscope.models.dispatch import Plan, Stopped
from factscope.models.handle import ModelHandle
from factscope.progress import Progress, Timed, silent

MAX_BYTES = 2_000_000_000
BATCH_TOKENS = 2048
"""Tokens of a forward, padding included."""
SORTED = 64
"""Texts that are sorted by length together."""
SAVE_SECONDS = 30.0
PROBED_TEXTS = 200
"""Texts whose tokens are counted for an estimate."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Texts to collect from.

    Attributes:
        origin: where they come from, in words. ``fingerprint``: changes with their content.
    """

    texts: tuple[str, ...]
    origin: str
    fingerprint: str

    @staticmethod
    def of(texts: Sequence[str], origin: str) -> Corpus:
        """A list of texts.

        Raises:
            DatasetError: there is none.
        """
        kept = tuple(text for text in texts if text.strip())
        if not kept:
            raise DatasetError(f"{origin} holds no text", "give text to collect from")
        digest = hashlib.sha256()
        for text in kept:
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "big") + data)
        return Corpus(texts=kept, origin=origin, fingerprint=digest.hexdigest()[:16])


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a collection will take, before it begins.

    Attributes:
        tokens: about so many. ``seconds``: about so long, by a batch that was timed; nothing is kept of it.
        n_bytes: on disk, and about the same twice over in memory.
    """

    n_texts: int
    tokens: int
    seconds: float
    n_bytes: int
    warnings: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """All of it in words."""
        return (
            f"about {self.tokens:,} tokens of {self.n_texts:,} texts, {self.seconds:,.0f} seconds, "
            f"{self.n_bytes / 1e6:,.1f} MB on disk"
        )

    def row(self) -> dict[str, Any]:
        """As a table shows it."""
        return {
            "texts": self.n_texts,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 1),
            "size_mb": round(self.n_bytes / 1e6, 1),
        }


@dataclass(frozen=True, kw_only=True)
class Sums:
    """How far a collection is."""

    tokens: int
    batches: int


def read_corpus(path: str | os.PathLike[str]) -> Corpus:
    """Texts of a file or a folder.

    Raises:
        DatasetError: it is not there, too large, not text, or empty.
    """
    place = Path(path)
    label = printable(place.name) or "the folder"
    try:
        inside = place.is_dir()
        files = sorted(p for p in place.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()) if inside else []
    except (OSError, ValueError) as error:
        raise DatasetError(f"{label} cannot be opened ({getattr(error, 'strerror', None) or error})") from error
    if inside and not files:
        raise DatasetError(f"{label} holds no file that ends in {' or '.join(SUFFIXES)}", "put text files into it")
    texts: list[str] = []
    for file in files or [place]:
        content = content_of(file, printable(file.name), MAX_BYTES)
        texts += split_paragraphs(decoded(content, printable(file.name), "text")) if content.strip() else ()
    return Corpus.of(texts, label)


def estimate(
    model: ModelHandle,
    corpus: Corpus,
    layers: Sequence[int],
    *,
    n_texts: int | None = None,
    seed: int = 1,
    in_all: int | None = None,
) -> Cost:
    """What it will cost, by counting the tokens of some texts and timing one batch.

    Args:
        in_all: how many texts there will be, where the corpus is only the first of them.

    Raises:
        InputError: a layer is out of range, or the sample is none.
        CapabilityError: a layer has no plain down-projection.
    """
    chosen = _checked(model, layers)
    texts = _sample(corpus, n_texts, seed)
    probed = _tokenized(model, texts[:PROBED_TEXTS])
    count = len(texts) if in_all is None else in_all
    tokens = round(sum(map(len, probed)) / len(probed) * count)
    batch = _batches(probed[:SORTED])[0]
    sums = _zeros(model, chosen)
    _add(model, batch, sums)  # the first forward is slower than those that follow
    started = time.perf_counter()
    counted = _add(model, batch, sums)
    seconds = (time.perf_counter() - started) / max(1, counted) * tokens
    widths = [down_width(model, layer) for layer in chosen]
    few = [
        f"layer {n}: {tokens:,} tokens for {w:,} rows" for n, w in zip(chosen, widths, strict=True) if tokens < 2 * w
    ]
    said = (f"Too little text; the matrix will be singular or nearly so ({'; '.join(few)}).",) if few else ()
    return Cost(n_texts=count, tokens=tokens, seconds=seconds, n_bytes=sum(4 * w * w for w in widths), warnings=said)


def collect(
    model: ModelHandle,
    corpus: Corpus,
    layers: Sequence[int],
    *,
    n_texts: int | None = None,
    seed: int = 1,
    progress: Progress = silent,
) -> tuple[Stored, ...]:
    """Collect the second moments of some layers, or go on with it.

    Args:
        progress: called after every batch with ``Sums``; may raise to end it, and what was summed is kept.

    Raises:
        InputError: a layer is out of range, the sample is none, or the folder cannot be written.
        CapabilityError: a layer has no plain down-projection.
    """
    chosen = _checked(model, layers)
    keys = {layer: key(model, layer, corpus, n_texts, seed) for layer in chosen}
    there = {entry.key: entry for entry in stored()}
    wanted = [layer for layer in chosen if keys[layer] not in there]
    if wanted:
        run = _Collection(model, corpus, tuple(wanted), n_texts, seed)
        run.collect(Timed(progress))
        for layer in wanted:
            run.save(layer, keys[layer])
        run.forget()
        there = {entry.key: entry for entry in stored()}
    return tuple(there[keys[layer]] for layer in chosen)


def sums_of(
    model: ModelHandle, texts: Sequence[str], layers: Sequence[int], *, progress: Progress = silent
) -> tuple[dict[int, Tensor], int]:
    """``k k'`` summed over the tokens of some texts, and how many they are; nothing is written.

    Args:
        progress: called after every batch; may raise to end it.
    """
    chosen = _checked(model, layers)
    sums, tokens = _zeros(model, chosen), 0
    batches = _batches(_tokenized(model, texts))
    for done, batch in enumerate(batches, start=1):
        tokens += _add(model, batch, sums)
        progress(done, len(batches), Sums(tokens=tokens, batches=done))
    return sums, tokens


def take_over(model: ModelHandle, path: Path, layer: int) -> Stored:
    """Keep a published file's second moment as this model's.

    Raises:
        InputError: the file cannot be read, has another width, or cannot be kept.
        CapabilityError: the layer has no plain down-projection.
    """
    _checked(model, (layer,))
    found = read_file(model, path, layer)
    assert found.matrix is not None
    content = hashlib.sha256(found.matrix.contiguous().numpy().tobytes()).hexdigest()[:16]
    told = {
        **_info(model), "layer": layer, "corpus": content, "origin": found.origin, "n_tokens": found.n_tokens,
    }  # fmt: skip
    name = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
    _write(folder() / f"{name}.safetensors", {TENSOR: found.matrix.float()}, told)
    return next(entry for entry in stored() if entry.key == name)


def remove(name: str) -> Stored:
    """Remove what was collected under a key, or the only one whose key begins so.

    Raises:
        SpecError: there is none, or several.
    """
    found = [entry for entry in stored() if entry.key.startswith(name.strip())] if name.strip() else []
    if len(found) != 1:
        raise SpecError(
            f"{name[:40]!r} names {len(found)} collected statistics", "give more of a key that 'statistics' lists"
        )
    found[0].path.unlink(missing_ok=True)
    return found[0]


def key(model: ModelHandle, layer: int, corpus: Corpus, n_texts: int | None, seed: int) -> str:
    """Identifies a collection: sixteen hex digits of all that changes its numbers."""
    sample = "all" if n_texts is None or n_texts >= len(corpus.texts) else f"{n_texts} by {seed}"
    said = [_info(model), layer, corpus.fingerprint, sample, _longest(model)]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


class _Collection:
    """Sums on their way, with their place on disk."""

    def __init__(
        self, model: ModelHandle, corpus: Corpus, layers: tuple[int, ...], n_texts: int | None, seed: int
    ) -> None:
        self._model, self._corpus, self._layers = model.original, corpus, layers
        self._texts = _sample(corpus, n_texts, seed)
        self._sums = _zeros(model, layers)
        self._tokens = self._done = self._begun = 0
        names = "".join(key(model, layer, corpus, n_texts, seed) for layer in layers)
        self._place = folder() / f"{hashlib.sha256(names.encode()).hexdigest()[:16]}.partial"

    def collect(self, timed: Timed) -> None:
        """Go through the batches that are left."""
        batches = _batches(_tokenized(self._model, self._texts, timed.step))
        self._resume()
        timed(self._done, len(batches), Sums(tokens=self._tokens, batches=self._done))
        saved = time.monotonic()
        try:
            while self._done < len(batches):
                self._add(batches[self._done], timed.step)
                if time.monotonic() - saved > SAVE_SECONDS:
                    self._keep()
                    saved = time.monotonic()
                timed(self._done, len(batches), Sums(tokens=self._tokens, batches=self._done))
        except BaseException:
            self._keep()
            raise

    def _add(self, batch: Sequence[Sequence[int]], step: Callable[[], None]) -> None:
        """One batch; if it is stopped between two layers, those that have it are counted and do not get it again."""
        keys, counted = _keys(self._model, batch, self._layers, step)
        while self._begun < len(self._layers):
            step()
            layer = self._layers[self._begun]
            _sum_up(self._sums[layer], keys[layer])
            self._begun += 1
        self._begun = 0
        self._done += 1
        self._tokens += counted

    def save(self, layer: int, name: str) -> None:
        """The mean, with what it is of."""
        sample = "" if len(self._texts) == len(self._corpus.texts) else f", {len(self._texts):,} drawn texts"
        told = {
            **_info(self._model),
            "layer": layer,
            "corpus": self._corpus.fingerprint,
            "origin": f"{self._corpus.origin}{sample}, {self._tokens:,} tokens",
            "n_tokens": self._tokens,
        }
        mean = (self._sums[layer] / self._tokens).float().cpu()
        _write(folder() / f"{name}.safetensors", {TENSOR: mean}, told)

    def forget(self) -> None:
        """The sums are no longer needed."""
        self._place.unlink(missing_ok=True)

    def _keep(self) -> None:
        tensors = {str(layer): total.cpu() for layer, total in self._sums.items()}
        with suppress(SpecError):  # the reason for which it ends matters more
            _write(self._place, tensors, {"tokens": self._tokens, "done": self._done, "begun": self._begun})

    def _resume(self) -> None:
        """Where an earlier collection stopped; a file that cannot be read is none."""
        try:
            with safe_open(self._place, framework="pt") as file:
                told = json.loads(file.metadata()["factscope"])
                found = {layer: file.get_tensor(str(layer)) for layer in self._layers}
            done, begun, tokens = int(told["done"]), int(told["begun"]), int(told["tokens"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return
        if all(found[layer].shape == total.shape for layer, total in self._sums.items()):
            self._sums = {layer: found[layer].to(total) for layer, total in self._sums.items()}
            self._done, self._begun, self._tokens = done, begun, tokens


# ---------------------------------------------------------------------------------------------------- texts to sums


def _checked(model: ModelHandle, layers: Sequence[int]) -> tuple[int, ...]:
    if not layers:
        raise SpecError("no layer is named", "name the layers whose statistics are wanted: 5 or 3-7")
    for layer in layers:
        refuse_unless_it_has(model, "down_projection", layer)
    return tuple(sorted(set(layers)))


def _info(model: ModelHandle) -> dict[str, str]:
    info = model.original.info
    return {"model": info.name, "revision": info.revision, "dtype": info.dtype, "weights": info.weights}


def _longest(model: ModelHandle) -> int:
    return min(model.max_tokens or BATCH_TOKENS, BATCH_TOKENS)


def _sample(corpus: Corpus, n_texts: int | None, seed: int) -> tuple[str, ...]:
    if n_texts is None or n_texts >= len(corpus.texts):
        return corpus.texts
    if n_texts < 1:
        raise SpecError(f"a sample of {n_texts} texts is none", "ask for at least one")
    order = list(range(len(corpus.texts)))
    random.Random(seed).shuffle(order)
    return tuple(corpus.texts[i] for i in order[:n_texts])


def _tokenized(model: ModelHandle, texts: Sequence[str], step: Callable[[], None] = lambda: None) -> list[list[int]]:
    longest, found = _longest(model), []
    for begin in range(0, len(texts), SORTED):
        step()
        encoded = model.tokenizer(list(texts[begin : begin + SORTED]))["input_ids"]
        found += [list(ids[:longest]) for ids in encoded if len(ids)]
    if not found:
        raise DatasetError("the tokenizer makes no token of this text", "give text that it can read")
    return found


def _batches(tokenized: Sequence[list[int]]) -> list[list[list[int]]]:
    """Texts of like length, so many as a forward holds."""
    batches: list[list[list[int]]] = []
    for begin in range(0, len(tokenized), SORTED):
        batch: list[list[int]] = []
        for ids in sorted(tokenized[begin : begin + SORTED], key=len):
            if batch and (len(batch) + 1) * len(ids) > BATCH_TOKENS:
                batches.append(batch)
                batch = []
            batch.append(ids)
        batches.append(batch)
    return batches


def _zeros(model: ModelHandle, layers: Sequence[int]) -> dict[int, Tensor]:
    widths = {layer: down_width(model, layer) for layer in layers}
    return {layer: torch.zeros(width, width, dtype=torch.float64) for layer, width in widths.items()}


def _add(model: ModelHandle, batch: Sequence[Sequence[int]], sums: dict[int, Tensor]) -> int:
    """Add a batch's ``k k'``; how many tokens were counted."""
    keys, counted = _keys(model, batch, tuple(sums), lambda: None)
    for layer, total in sums.items():
        _sum_up(total, keys[layer])
    return counted


def _keys(
    model: ModelHandle, batch: Sequence[Sequence[int]], layers: Sequence[int], step: Callable[[], None]
) -> tuple[dict[int, Tensor], int]:
    """The keys of a batch's counted tokens by layer, and how many they are; ``step`` is called before every block."""
    special = set(getattr(model.tokenizer, "all_special_ids", ()) or ())
    longest = max(map(len, batch))
    ids = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in batch], device=model.device)
    counted = torch.tensor([[i < len(row) and row[i] not in special for i in range(longest)] for row in batch])
    plan = Plan(
        capture=frozenset(("neurons", layer) for layer in layers),
        stop_after=max(layers),
        enter=lambda layer, states: (step(), states)[1],
    )
    with suppress(Stopped):
        model.original.forward(ids, plan, last=1)
    found = {layer: plan.captured["neurons", layer].reshape(*ids.shape, -1) for layer in layers}
    return {layer: one[counted.to(one.device)] for layer, one in found.items()}, int(counted.sum())


def _sum_up(total: Tensor, keys: Tensor) -> None:
    """Add ``k k'`` of all keys."""
    keys = keys if keys.dtype == torch.float64 else keys.float()
    total += (keys.T @ keys).to(total)


def _write(path: Path, tensors: dict[str, Tensor], told: dict[str, Any]) -> None:
    """Written beside, then renamed."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            beside,
            metadata={"factscope": json.dumps(told)},
        )
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise SpecError(
            f"the statistics cannot be written to {path.parent} ({error})"[:300],
            "make room, or set FACTSCOPE_CACHE_DIR to a folder that can be written",
        ) from error
