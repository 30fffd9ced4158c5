"""An edited model as files that need no FactScope: the whole model merged, or a LoRA adapter for PEFT.

Both are made from an edited handle into a folder of their own; the weights in memory are not written. The edits
themselves lie beside, in ``edits.json``, so that it stays known what was changed.

Merged: the checkpoint as transformers writes it, the edited matrices replaced by ``W + left right`` and ``b + bias``,
summed in float64 and rounded once. bfloat16 keeps three digits of a weight, which can be more than an edit moves it by:
what is lost is measured on the very matrices that are written, and said.

Adapter (Hu et al. 2021, arXiv 2106.09685, section 4.1: ``W + B A``): ``A`` is ``left`` and ``B`` is ``right``,
transposed; several deltas of one map stand side by side. A change of full rank or of a bias is no such product.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from factscope.editors.edit import Edit, EditedModel
from factscope.editors.files import shown
from factscope.errors import CapabilityError, EditError, ModelError
from factscope.interventions.weights import WeightDelta
from factscope.models.handle import ModelHandle
from factscope.models.loading import DTYPES, QUIET
from factscope.models.offload import there
from factscope.models.sources import BUNDLED, RANDOM_PREFIX, bundled_folder, parse_name
from factscope.settings import get_settings

Stored = Literal["loaded", "float32"]
LOST = 0.05
"""Share of an edit that rounding may take before it is said."""
_SHARD = "5GB"
_EXPORTED = "export it merged"


def export_merged(model: ModelHandle, folder: Path | str, *, stored: Stored = "loaded") -> tuple[str, ...]:
    """Write the edited model, weights, configuration and tokenizer, into a new folder.

    Args:
        model: with the edits on.
        stored: the type of the weights that are written: the one that the model was loaded in, or float32.

    Returns:
        What is to be said of it: how much of an edit the rounding took.

    Raises:
        EditError: no edit is on, or the folder cannot be used.
        CapabilityError: an edit cannot be written into this model's weights.
    """
    folder = Path(folder)
    _refuse_plain(model)
    refuse_taken(folder)
    own: Any = copy.copy(model._model)  # saving notes class and type in the configuration
    own.config = copy.deepcopy(own.config)
    state, said = own.state_dict(), []
    target = torch.float32 if stored == "float32" else None
    for layer, module, name, deltas in _edited_maps(model):
        merged = _merged(model, module, name, deltas)
        told = _rounding(layer, merged, target)
        said += [told] if told else []
        for key, (before, changed) in merged.items():
            state[f"{name}.{key}"] = changed.to(target or before.dtype)
    if target is not None:
        state = _in_type(own, state, target)
    with QUIET, _new_folder(folder) as place:
        own.save_pretrained(place, state_dict=state, max_shard_size=_SHARD)
        model.tokenizer.save_pretrained(place)
        if target is not None:
            config = json.loads((place / "config.json").read_text(encoding="utf-8"))
            _write_json(place / "config.json", config | {"dtype": "float32"})
        _write_provenance(place, model)
    return tuple(said)


def export_peft(model: ModelHandle, folder: Path | str, *, portable: bool = False) -> None:
    """Write the edits as a LoRA adapter into a new folder.

    Args:
        model: with the edits on.
        portable: for another machine, so that the adapter does not name a folder of this one as its base.

    Raises:
        EditError: no edit is on, one is of full rank or changes a bias, or the folder cannot be used.
    """
    folder = Path(folder)
    _refuse_plain(model)
    refuse_taken(folder)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    transposed: set[bool] = set()
    for layer, module, name, deltas in _edited_maps(model):
        lefts, rights = [], []
        for delta in deltas:
            if delta.left is None or delta.bias is not None:
                what = "changes a bias" if delta.bias is not None else "is of full rank"
                raise EditError(
                    f"the change of the {delta.place.replace('_', '-')} of layer {layer} {what}, which no LoRA adapter "
                    "holds",
                    _EXPORTED,
                )
            lefts.append(delta.left.detach().float().cpu())
            rights.append(delta.right.detach().float().cpu())
        left, right = torch.cat(lefts, dim=1), torch.cat(rights, dim=0)
        tensors[f"base_model.model.{name}.lora_A.weight"] = left.T.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = right.T.contiguous()
        ranks[name] = left.shape[1]
        transposed.add(isinstance(module, Conv1D))
    if len(transposed) > 1:
        raise EditError("the edited maps keep their matrices in two orders, which no LoRA adapter tells", _EXPORTED)
    with _new_folder(folder) as place:
        save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
        config = _adapter_config(model, ranks, _base(model, portable), fan_in_fan_out=transposed.pop())
        _write_json(place / "adapter_config.json", config)
        _write_provenance(place, model)


def where(edit: Edit) -> tuple[str, str | None]:
    """Name of the model of an edit, and its revision; only models of the hub have one to choose.

    Raises:
        ModelError: the name is none, or not allowed here.
    """
    found = parse_name(edit.model.name, settings=get_settings())
    return found.name, edit.model.revision if found.repo is not None else None


def type_of(edit: Edit) -> str:
    """The type in which the model of an edit was loaded.

    Raises:
        EditError: there is no such type.
    """
    if edit.model.dtype not in DTYPES:
        raise EditError(f"{edit} was made for weights in {edit.model.dtype[:40]!r}", f"use one of {', '.join(DTYPES)}")
    return edit.model.dtype


def _adapter_config(
    model: ModelHandle, ranks: Mapping[str, int], base: tuple[str | None, str | None], *, fan_in_fan_out: bool
) -> dict[str, Any]:
    """With alpha equal to the rank of every map, the product is added as it is."""
    highest = max(ranks.values())
    other = {name: rank for name, rank in ranks.items() if rank != highest}
    name, revision = base
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True,
        "base_model_name_or_path": name, "revision": revision,
        "r": highest, "lora_alpha": highest, "rank_pattern": other, "alpha_pattern": other,
        "target_modules": sorted(ranks), "fan_in_fan_out": fan_in_fan_out,
        "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "use_dora": False,
    }  # fmt: skip


def _base(model: ModelHandle, portable: bool) -> tuple[str | None, str | None]:
    """Where PEFT finds the model that the adapter belongs to; nowhere for drawn weights."""
    info = model.info
    if info.name.startswith(RANDOM_PREFIX):
        return None, None
    path = bundled_folder() if info.name == BUNDLED else Path(info.name).expanduser()
    if info.name == BUNDLED or path.is_dir():
        return (None if portable else str(path.resolve())), None
    return info.name, info.revision


# --------------------------------------------------------------------------------------------------- the weights


def _edited_maps(model: ModelHandle) -> Iterator[tuple[int, nn.Module, str, list[WeightDelta]]]:
    """Layer, module, its name in the checkpoint, and what is added to it."""
    names = {id(module): name for name, module in model._model.named_modules()}
    deltas = [delta for edit in model.edits for delta in edit.deltas]
    wiring = model.parts.wiring
    for place, layer in sorted({(delta.place, delta.layer) for delta in deltas}):
        found = (wiring.down_projection if place == "down_projection" else wiring.output_projection)[layer]
        assert found is not None  # with_edits has looked
        own = [delta for delta in deltas if (delta.place, delta.layer) == (place, layer)]
        yield layer, found, names[id(found)], own


def _merged(
    model: ModelHandle, module: Any, name: str, deltas: Sequence[WeightDelta]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Of an edited map, its weight and bias as they were, and as they are to be, in float64.

    Raises:
        CapabilityError: the weight is quantised, or there is no bias to change.
    """
    weight = there(model._model, f"{name}.weight", module.weight)
    if not weight.is_floating_point():
        raise CapabilityError(
            f"the weights of {model.info.name} are kept in {weight.dtype}, into which no edit can be written",
            "load it in float32 or bfloat16, or export an adapter",
        )
    change = sum(delta.to(weight.double()).matrix() for delta in deltas)
    merged = {"weight": (weight, weight.double() + (change if isinstance(module, Conv1D) else change.T))}
    if any(delta.bias is not None for delta in deltas):
        if getattr(module, "bias", None) is None:
            raise CapabilityError(
                f"{name} of {model.info.name} ({model.info.family}) has no bias into which that of the edit could be "
                "written",
                "edit the weight alone",
            )
        bias = there(model._model, f"{name}.bias", module.bias)
        moved = sum(delta.bias.to(bias.double()) for delta in deltas if delta.bias is not None)
        merged["bias"] = (bias, bias.double() + moved)
    return merged


def _rounding(layer: int, merged: Mapping[str, tuple[Tensor, Tensor]], target: torch.dtype | None) -> str:
    """What is to be said of a map whose change is lost in part; empty where it is not."""
    for key, (before, changed) in merged.items():
        kept = target or before.dtype
        wanted = changed - before.double()
        lost = float((changed.to(kept).double() - changed).norm() / wanted.norm().clamp(min=1e-300))
        if lost > LOST:
            return (
                f"Written in {str(kept).removeprefix('torch.')}, {100 * min(lost, 1):.0f}% of the change of a {key} in "
                f"layer {layer} is lost to rounding; write it in float32."
            )
    return ""


def _in_type(own: Any, state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """All weights in one type, those that are offloaded read; tied ones stay one tensor."""
    seen: dict[tuple[int, torch.Size], Tensor] = {}
    found = {}
    for name, tensor in state.items():
        weight = there(own, name, tensor)
        if weight.is_floating_point():
            key = weight.data_ptr(), weight.shape
            seen[key] = weight = seen[key] if key in seen else weight.to(dtype)
        found[name] = weight
    return found


# ---------------------------------------------------------------------------------------------------- the folder


def _refuse_plain(model: ModelHandle) -> None:
    if not model.edits:
        raise EditError("no edit is on, so that there is nothing to export", "name at least one")


def refuse_taken(folder: Path) -> None:
    """Refuse a folder that has something in it, before anything is computed.

    Raises:
        EditError: it does, or there is no place for it.
    """
    try:
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
        there = folder.absolute().parent.is_dir()
    except (OSError, ValueError) as error:
        raise _unwritable(folder, error) from error
    if taken:
        raise EditError(f"the folder {shown(folder)} is there already and not empty", "name a new one")
    if not there:
        raise EditError(f"{shown(folder)} lies in a folder that does not exist", "make that folder first")


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside, which becomes this one when all is written; else it is gone.

    Raises:
        EditError: it cannot be written.
        ModelError: transformers refuses to save what it is given.
    """
    place: Path | None = None
    try:
        place = Path(tempfile.mkdtemp(dir=folder.absolute().parent, prefix=".factscope-"))
        yield place
        os.chmod(place, 0o777 & ~_umask())
        os.replace(place, folder)
    except OSError as error:
        raise _unwritable(folder, error) from error
    except (ValueError, NotImplementedError) as error:
        raise ModelError(
            f"transformers cannot save this model ({str(error)[:300]})", "save the edit instead"
        ) from error
    finally:
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _unwritable(folder: Path, error: Exception) -> EditError:
    why = getattr(error, "strerror", None) or str(error)
    return EditError(f"the folder {shown(folder)} cannot be written ({why})", "choose another place")


def _write_provenance(place: Path, model: ModelHandle) -> None:
    edits = [edit.summary() | {"spec": dict(edit.spec), "templates": list(edit.templates)} for edit in model.edits]
    data = {"schema": 1, "model": asdict(EditedModel.of(model)), "weights": model.info.weights, "edits": edits}
    _write_json(place / "edits.json", data)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
