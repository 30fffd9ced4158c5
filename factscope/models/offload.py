"""Weights that accelerate keeps on disk or in main memory, read without bringing them into the model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.integrations.accelerate import load_offloaded_parameter


def there(model: Any, name: str, tensor: Tensor) -> Tensor:
    """A weight of a model by its name, read from where it is kept.

    Args:
        tensor: what the model itself holds under this name; ``meta`` where the weight is elsewhere.
    """
    return (load_offloaded_parameter(model, name) if tensor.is_meta else tensor).detach()


def weight_of(model: Any, module: nn.Module) -> Tensor:
    """The weight of one of a model's linear maps, as its module keeps it.

    Raises:
        StopIteration: the module is not the model's.
    """
    name = next(name for name, found in model.named_modules() if found is module)
    weight: Any = module.weight
    return there(model, f"{name}.weight", weight)
