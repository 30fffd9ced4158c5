"""What is done to a freshly loaded model, before anybody shares it, that makes it faster and changes no number.

Three things, each kept only where it was measured to be the same computation:

- the attention goes through a function of ours (``dispatch.attention``) where the family honours transformers'
  attention interface. Without a plan it is the family's own eager function; a plan may put another in its place for
  its own context. It is set once: switching it around a run would switch it for every other thread;
- GPT-2's tanh GELU, written in Python as eight passes over memory, becomes torch's fused one (in float32: in half
  precision the eight roundings between the passes are part of the model);
- GPT-2's transposed linear maps (Conv1D) are stored by columns where their rows are a multiple of 4 KiB apart: such
  rows share few sets of the processor's cache, and products of some 100 rows lose a third of their speed.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from factscope.models.discovery import probe_ids
from factscope.models.dispatch import ATTENTION, Attend, Plan, Wiring, eager_attention, plan_set

logger = logging.getLogger(__name__)

PAGE = 4096
"""Bytes; addresses so far apart fall into the same set of the first-level cache."""


def tune(model: Any, wiring: Wiring, device: torch.device) -> bool:
    """Tune a model in place.

    Returns:
        Whether the attention goes through ``dispatch.attention``.
    """
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return False  # spread over devices: accelerate moves states and weights around
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is NewGELUActivation and model.dtype == torch.float32:
                setattr(module, name, nn.GELU(approximate="tanh"))
        if isinstance(module, Conv1D) and module.weight.device.type == "cpu":
            weight = module.weight.data
            if weight.shape[1] * weight.element_size() % PAGE == 0:
                module.weight.data = weight.t().contiguous().t()
    return _install_attention(model, wiring, device)


def _install_attention(model: Any, wiring: Wiring, device: torch.device) -> bool:
    before = str(model.config._attn_implementation)
    attending = [module for module in wiring.attention if module is not None]
    if before != "eager" or not attending or not model._can_set_attn_implementation():
        return False
    ids = probe_ids(model.get_input_embeddings().num_embeddings).to(device)
    calls: list[nn.Module] = []

    def counted(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        calls.append(module)
        return eager_attention(module)(module, *args, **kwargs)

    plain = _logits(model, ids, None)
    try:
        model.set_attn_implementation(ATTENTION)
        same = torch.allclose(_logits(model, ids, counted), plain, rtol=1e-5, atol=1e-6)
    except Exception as error:  # any failure means that this family keeps its own way
        logger.debug("%s: no attention interface (%s)", model.config.model_type, error)
        same = False
    if same and calls == attending:
        return True
    model.set_attn_implementation(before)
    return False


def _logits(model: Any, ids: Tensor, attend: Attend | None) -> Tensor:
    with torch.no_grad(), plan_set(Plan(attend=attend)):
        return model(input_ids=ids, use_cache=False).logits
