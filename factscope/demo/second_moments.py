"""Second moments of the bundled model's keys: ``python -m factscope.demo.second_moments`` makes the file that ships.

They are collected from documents of the kind that the model was trained on, drawn anew, and kept as what takes
little room and stays a covariance when it is rounded: the Cholesky factor of each layer's matrix, its rows at length
one, lower triangles in float16, and the lengths in float32.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FILE = Path(__file__).with_name("second_moments.safetensors")
SEED = 20
"""Of the documents; training drew its own from other seeds."""
log = logging.getLogger(__name__)


def packed(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the Cholesky factor at length one, lower triangle in float16; and their lengths."""
    factor = torch.linalg.cholesky(matrix.double())
    lengths = factor.norm(dim=1)
    rows = factor / lengths[:, None]
    return rows[torch.tril_indices(*rows.shape).unbind()].half(), lengths.float()


def unpacked(triangle: Tensor, lengths: Tensor) -> Tensor:
    """The matrix again, in float64."""
    width = lengths.shape[0]
    factor = torch.zeros(width, width, dtype=torch.float64)
    factor[torch.tril_indices(width, width).unbind()] = triangle.double()
    factor *= lengths.double()[:, None]
    return factor @ factor.T


def provenance(path: Path = FILE) -> dict[str, Any]:
    """What the file says of itself."""
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["factscope"])


def read(weights: str, layer: int, path: Path = FILE) -> tuple[Tensor, int, str] | None:
    """Matrix, tokens and origin of a layer; None for weights that are not the bundled model's.

    Args:
        weights: fingerprint of the weights without edits.
    """
    if not path.is_file():
        return None
    told = provenance(path)
    if told["weights"] != weights:
        return None
    with safe_open(path, framework="pt") as file:
        matrix = unpacked(file.get_tensor(f"{layer}.triangle"), file.get_tensor(f"{layer}.lengths"))
    return matrix, int(told["tokens"]), told["origin"]


def documents(count: int) -> list[str]:
    """Texts such as the model was trained on."""
    from factscope.demo.corpus import Corpus
    from factscope.demo.facts import read_rows, read_sentences
    from factscope.demo.packing import text_and_answers

    corpus = Corpus(read_rows(), read_sentences(), seed=SEED, late=True)
    return [text_and_answers(document)[0] for document in itertools.islice(corpus.documents(), count)]


def main(
    texts: Annotated[int, typer.Option(help="How many documents.")] = 8_000,
    out: Annotated[Path, typer.Option(help="The file.")] = FILE,
) -> None:
    """Collect the second moments of all layers and write them."""
    from factscope.editors.collecting import sums_of
    from factscope.models.loading import load
    from factscope.models.sources import bundled_folder

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = load("bundled")
    layers = range(model.info.n_layers)
    sums, tokens = sums_of(
        model, documents(texts), layers, progress=lambda done, total, _: log.info("%s of %s", done, total)
    )
    tensors: dict[str, Tensor] = {}
    for layer, total in sums.items():
        tensors[f"{layer}.triangle"], tensors[f"{layer}.lengths"] = packed(total / tokens)
    file = bundled_folder() / "model.safetensors"
    told = {
        "weights": model.info.weights,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "tokens": tokens,
        "documents": texts,
        "seed": SEED,
        "origin": f"{texts:,} documents such as the model was trained on, {tokens:,} tokens",
        "program": "python -m factscope.demo.second_moments",
    }
    save_file(tensors, out, metadata={"factscope": json.dumps(told)})


if __name__ == "__main__":
    typer.run(main)
