"""What a model's files say before they are loaded: names, configuration, headers of the weights.

Each way in which files can be unusable is found here and gets its own sentence, so that nothing has to be read out of
an exception's text later.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from factscope.errors import ModelFilesError, ModelNotFound, ModelUnsupported

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "tiktoken.model",
)
_UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".pkl", ".gguf", ".onnx")
_POINTER = b"version https://git-lfs"
DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
}
"""Bytes of one value by the name that safetensors gives its type; every other type takes one."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder of model files that can be tried.

    Attributes:
        folder: where the files lie.
        config: config.json as it stands.
        model_type: the family by transformers' name.
        counts: how many values the weights hold, by safetensors' name of the type; empty where no weights are needed.
    """

    folder: Path
    config: Mapping[str, Any]
    model_type: str
    counts: Mapping[str, int]


def inspect(folder: Path, name: str, *, weights: bool = True) -> Checkpoint:
    """Check a folder's files without loading a weight.

    Args:
        folder: an existing folder.
        name: how sentences call the model, in quotes.
        weights: whether weights are needed; not for random ones.

    Raises:
        ModelFilesError: something is missing, damaged or unsafe.
        ModelNotFound: the folder is empty.
        ModelUnsupported: not a causal language model that transformers knows.
    """
    names = _names(folder, name)
    check_names(names, name, weights=weights)
    config = read_config(folder, name)
    model_type = check_config(config, name)
    counts = count_values(folder, name) if weights else {}
    return Checkpoint(folder=folder, config=config, model_type=model_type, counts=counts)


def _names(folder: Path, name: str) -> tuple[str, ...]:
    try:
        return tuple(entry.name for entry in folder.iterdir())
    except PermissionError:
        raise ModelFilesError(f"the folder of {name} may not be read", "change its permissions") from None


def check_names(names: Iterable[str], name: str, *, weights: bool = True) -> None:
    """Refuse a model whose file names alone show that it cannot be loaded."""
    found = set(names)
    if not found:
        raise ModelNotFound(
            f"the folder of {name} is empty", "give the folder that contains config.json and the weights"
        )
    if CONFIG not in found:
        if "adapter_config.json" in found:
            raise ModelFilesError(
                f"{name} is an adapter without its base model (no config.json)", "merge it into the base model first"
            )
        if "params.json" in found or any(file.endswith(".gguf") for file in found):
            raise ModelFilesError(
                f"{name} is not in transformers' format (no config.json)", "use a version converted to transformers"
            )
        raise ModelFilesError(f"{name} has no config.json", "give a folder or repository in transformers' format")
    if weights and WEIGHTS not in found and WEIGHTS_INDEX not in found:
        unsafe = sorted(
            file for file in found if file.endswith(_UNSAFE_SUFFIXES) and not file.startswith("training_args")
        )
        if unsafe:
            raise ModelFilesError(
                f"{name} has its weights only as {unsafe[0]}, which could run code when it is opened",
                "use a version with safetensors, or convert it with 'save_pretrained'",
            )
        raise ModelFilesError(f"{name} has no weights (no {WEIGHTS})", "download or save it completely")
    if not found.intersection(_TOKENIZER_FILES):
        raise ModelFilesError(
            f"{name} has no tokenizer files (no tokenizer.json, vocab.json or tokenizer.model)",
            "save its tokenizer into the same folder",
        )


def needed_names(names: Iterable[str], *, weights: bool = True) -> tuple[str, ...]:
    """Which files of a repository to download: the configuration, the tokenizer and one form of the weights."""
    top = sorted(file for file in names if len(PurePosixPath(file).parts) == 1)
    small = [
        file
        for file in top
        if file.endswith((".json", ".txt", ".model", ".jinja", ".tiktoken")) and not file.endswith(".index.json")
    ]
    if not weights:
        return tuple(small)
    if WEIGHTS in top:
        return (*small, WEIGHTS)
    shards = [file for file in top if file.endswith(".safetensors") and file.startswith("model")]
    return (*small, WEIGHTS_INDEX, *shards)


def read_config(folder: Path, name: str) -> Mapping[str, Any]:
    """config.json as a mapping.

    Raises:
        ModelFilesError: it is not there, no JSON, or not an object.
    """
    found = _read_json(folder / CONFIG, name)
    if not isinstance(found, dict):
        raise ModelFilesError(f"the config.json of {name} holds no object", "download or save the model again")
    return found


def _read_json(path: Path, name: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelFilesError(
            f"the {path.name} of {name} is damaged: no JSON at line {error.lineno}, column {error.colno}",
            "download or save the model again",
        ) from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise ModelFilesError(
            f"the {path.name} of {name} is damaged: not text", "download or save the model again"
        ) from error
    except OSError as error:
        raise ModelFilesError(
            f"the {path.name} of {name} cannot be read ({error.strerror})", "check the file"
        ) from error


def check_config(config: Mapping[str, Any], name: str) -> str:
    """The model type, if transformers has a causal language model of that type.

    Raises:
        ModelFilesError: no model type is named.
        ModelUnsupported: the type is unknown, not causal, or defined by the repository's own code.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise ModelFilesError(f"the config.json of {name} names no model_type", "use a model in transformers' format")
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return model_type
    if model_type in CONFIG_MAPPING_NAMES:
        raise ModelUnsupported(
            f"{name} is of type {model_type!r}, which is not a causal language model",
            "choose a decoder such as GPT-2, Llama, Qwen or Pythia",
        )
    if "auto_map" in config:
        raise ModelUnsupported(
            f"{name} is of type {model_type!r}, defined by code in its own repository, which is never run here",
            "choose a model that transformers itself contains",
        )
    raise ModelUnsupported(
        f"{name} is of type {model_type!r}, which the installed transformers does not know",
        "update transformers or choose another model",
    )


def count_values(folder: Path, name: str) -> Mapping[str, int]:
    """How many values the weights hold, by type, from the headers alone.

    Raises:
        ModelFilesError: a part of the weights is missing or damaged.
    """
    counts: Counter[str] = Counter()
    for path in _weight_files(folder, name):
        for entry in read_header(path, name).values():
            counts[entry["dtype"]] += math.prod(entry["shape"])
    return dict(counts)


def _weight_files(folder: Path, name: str) -> tuple[Path, ...]:
    if (folder / WEIGHTS).exists():
        return (folder / WEIGHTS,)
    index = _read_json(folder / WEIGHTS_INDEX, name)
    parts = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
        raise ModelFilesError(f"the {WEIGHTS_INDEX} of {name} has no weight_map", "download or save the model again")
    files = tuple(sorted(set(parts.values())))
    outside = next((file for file in files if PurePosixPath(file).name != file), None)
    if outside is not None:
        raise ModelFilesError(
            f"the {WEIGHTS_INDEX} of {name} points to {outside!r}, outside its folder", "use another copy"
        )
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise ModelFilesError(
            f"{name} lacks {len(missing)} of {len(files)} parts of its weights, the first is {missing[0]}",
            "download or save the model completely",
        )
    return tuple(folder / file for file in files)


def read_header(path: Path, name: str) -> Mapping[str, Mapping[str, Any]]:
    """The tensors that a safetensors file declares: name to ``dtype``, ``shape``, ``data_offsets``.

    Raises:
        ModelFilesError: the file is shorter or longer than it declares, or no safetensors file.
    """
    again = "download or save it again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if (start + file.read(32)).startswith(_POINTER):
                raise ModelFilesError(
                    f"{path.name} of {name} is only a Git LFS pointer, not the weights",
                    "run 'git lfs pull' in the folder",
                )
            if len(start) < 8 or not 2 <= length <= min(size - 8, 100_000_000):
                raise ModelFilesError(
                    f"{path.name} of {name} is damaged: it has no safetensors header ({size:,} bytes)", again
                )
            file.seek(8)
            header = json.loads(file.read(length))
            entries = {key: value for key, value in header.items() if key != "__metadata__"}
            declared = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
            _ = [(entry["dtype"].upper(), math.prod(entry["shape"])) for entry in entries.values()]
    except OSError as error:
        raise ModelFilesError(f"{path.name} of {name} cannot be read ({error.strerror})", "check the file") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ModelFilesError(
            f"{path.name} of {name} is damaged: its safetensors header cannot be read", again
        ) from error
    if declared != size:
        raise ModelFilesError(
            f"{path.name} of {name} is damaged: it should have {declared:,} bytes and has {size:,}", again
        )
    return entries


def files_fingerprint(folder: Path) -> str:
    """Twelve hex digits that change with configuration, tokenizer and the layout of the weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".txt", ".model", ".jinja") and path.is_file():
            digest.update(path.name.encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        elif path.suffix == ".safetensors":
            digest.update(f"{path.name}{path.stat().st_size}".encode())
    return digest.hexdigest()[:12]
