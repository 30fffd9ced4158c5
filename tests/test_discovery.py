"""Parts are found by measuring: the table of models.md section 1 comes out, and a model that lies is found out."""

from __future__ import annotations

import copy
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from factscope.errors import CapabilityError, ModelUnsupported
from factscope.experiments.attention_knockout import run
from factscope.experiments.logit_lens import LensSpec
from factscope.experiments.logit_lens import run as lens
from factscope.models.discovery import discover, probe_ids
from factscope.models.handle import ModelHandle, fingerprint
from tests.oracle.laboratory import distinct_prompt, handle_of, query_on
from tests.tiny_models import FAMILIES

# family: attention, output projection inside it, down-projection, what is added to the stream, parallel
PARTS: dict[str, tuple[str, str, str | None, tuple[str, str], bool]] = {
    "gpt2": ("attn", "c_proj", "mlp.c_proj", ("attn.c_proj", "mlp.c_proj"), False),
    "gptj": ("attn", "out_proj", "mlp.fc_out", ("attn.out_proj", "mlp.fc_out"), True),
    "gpt_neo": ("attn.attention", "out_proj", "mlp.c_proj", ("attn.attention.out_proj", "mlp.c_proj"), False),
    "gpt_neox": ("attention", "dense", "mlp.dense_4h_to_h", ("attention.dense", "mlp.dense_4h_to_h"), True),
    "gpt_neox_seq": ("attention", "dense", "mlp.dense_4h_to_h", ("attention.dense", "mlp.dense_4h_to_h"), False),
    "opt": ("self_attn", "out_proj", "fc2", ("self_attn.out_proj", "fc2"), False),
    "bloom": ("self_attention", "dense", "mlp.dense_4h_to_h", ("self_attention.dense", "mlp.dense_4h_to_h"), False),
    "falcon_7b": ("self_attention", "dense", "mlp.dense_4h_to_h", ("self_attention.dense", "mlp.dense_4h_to_h"), True),
    "llama": ("self_attn", "o_proj", "mlp.down_proj", ("self_attn.o_proj", "mlp.down_proj"), False),
    "gemma2": (
        "self_attn",
        "o_proj",
        "mlp.down_proj",
        ("post_attention_layernorm", "post_feedforward_layernorm"),
        False,
    ),
    "olmo2": (
        "self_attn",
        "o_proj",
        "mlp.down_proj",
        ("post_attention_layernorm", "post_feedforward_layernorm"),
        False,
    ),
    "glm4": ("self_attn", "o_proj", "mlp.down_proj", ("post_self_attn_layernorm", "post_mlp_layernorm"), False),
    "phi": ("self_attn", "dense", "mlp.fc2", ("self_attn.dense", "mlp.fc2"), True),
    "starcoder2": ("self_attn", "o_proj", "mlp.c_proj", ("self_attn.o_proj", "mlp.c_proj"), False),
    "mpt": ("attn", "out_proj", "ffn.down_proj", ("attn.out_proj", "ffn.down_proj"), False),
    "granite": ("self_attn", "o_proj", "mlp.down_proj", ("self_attn.o_proj", "mlp.down_proj"), False),
    "cohere": ("self_attn", "o_proj", "mlp.down_proj", ("self_attn.o_proj", "mlp.down_proj"), True),
    "stablelm_par": ("self_attn", "o_proj", "mlp.down_proj", ("self_attn.o_proj", "mlp.down_proj"), True),
    "mixtral": ("self_attn", "o_proj", None, ("self_attn.o_proj", "mlp"), False),
    "gpt_oss": ("self_attn", "o_proj", None, ("self_attn.o_proj", "mlp"), False),
}


@lru_cache(maxsize=2)
def known(name: str) -> ModelHandle:
    return handle_of(FAMILIES[name](0), name)


@pytest.mark.parametrize("name", PARTS)
def test_parts_are_those_of_the_table(name: str) -> None:
    attention, projection, down, updates, parallel = PARTS[name]
    parts = known(name).parts
    assert len(parts.wiring.layers) == len(parts.paths) == 4
    assert parts.parallel == (parallel,) * 4
    assert parts.additive == (True,) * 4
    assert parts.experts == (down is None,) * 4
    for layer, block in enumerate(parts.wiring.layers):
        assert parts.paths[layer]["attention"] == attention
        assert parts.paths[layer]["output_projection"] == f"{attention}.{projection}"
        assert parts.paths[layer].get("down_projection") == down
        assert parts.wiring.attention[layer] is block.get_submodule(attention)
        assert parts.wiring.output_projection[layer] is block.get_submodule(f"{attention}.{projection}")
        assert parts.wiring.down_projection[layer] is (None if down is None else block.get_submodule(down))
        for site, path in zip(("attention", "mlp"), updates, strict=True):
            module, multiplier = parts.wiring.updates[layer][site]
            assert _path(block, module) == path
            assert multiplier == pytest.approx(0.22 if name == "granite" else 1.0, abs=1e-4)


def _path(block: nn.Module, module: nn.Module) -> str:
    return next(path for path, found in block.named_modules() if found is module)


def test_modules_that_give_the_same_are_not_told_apart_by_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Granite scales its updates, so they are fitted; its attention gives what its output projection gives."""
    solve, tries = torch.linalg.lstsq, [0]

    def each_a_little_better(*args: Any) -> Any:
        tries[0] += 1
        found = solve(*args)
        return SimpleNamespace(solution=found.solution * (1 + 1e-5 / tries[0]))

    monkeypatch.setattr(torch.linalg, "lstsq", each_a_little_better)
    wiring = discover(FAMILIES["granite"](0), torch.device("cpu")).wiring
    assert tries[0] >= 4
    assert [update["attention"][0] for update in wiring.updates] == list(wiring.output_projection)


def test_sparse_and_dense_layers_of_one_model_are_told_apart() -> None:
    assert known("qwen2_moe").parts.experts == (True, False, True, True)
    assert known("deepseek_v3").parts.experts == (False, True, True, True)
    assert known("qwen2_moe").parts.paths[1]["down_projection"] == "mlp.down_proj"


def test_a_model_without_attention_has_no_attention() -> None:
    parts = known("mamba").parts
    assert parts.wiring.attention == (None,) * 4
    assert all("attention" not in paths for paths in parts.paths)


def test_discovery_leaves_no_hook_and_no_other_weight() -> None:
    model = FAMILIES["llama"](0)
    before = fingerprint(model)
    discover(model, torch.device("cpu"))
    assert fingerprint(model) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_probe_tokens_are_the_same_everywhere_and_leave_the_random_state_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, second = probe_ids(97), probe_ids(97)
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(first, second)
    assert first.shape == (1, 10)
    assert int(first.max()) < 97


def test_fingerprint_follows_every_tensor() -> None:
    model = FAMILIES["gpt2"](0)
    seen = {fingerprint(model), fingerprint(FAMILIES["gpt2"](1))}
    assert fingerprint(copy.deepcopy(model)) in seen
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.transformer.h[3].ln_2.bias[5] += 1e-3
    seen |= {fingerprint(changed), fingerprint(copy.deepcopy(model).to(torch.bfloat16))}
    assert len(seen) == 4


def deaf(attention: nn.Module) -> None:
    """The attention takes a mask and looks at everything before it all the same, as a fused kernel might."""
    inner = attention.forward

    def forward(hidden_states: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        length = keys = hidden_states.shape[1]
        if kwargs.get("past_key_values") is not None:
            keys += kwargs["past_key_values"].get_seq_length(attention.layer_idx)
        causal = torch.ones(length, keys, dtype=torch.bool).tril(diagonal=keys - length)
        own = torch.zeros(1, 1, length, keys).masked_fill(~causal, torch.finfo(torch.float32).min)
        return inner(hidden_states, attention_mask=own, **kwargs)[0], None

    attention.forward = forward


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_an_attention_that_ignores_its_mask_is_found_out(layer: int) -> None:
    model = FAMILIES["llama"](0)
    ids = distinct_prompt(model, 8, seed=1)
    deaf(model.model.layers[layer].self_attn)
    handle = handle_of(model, "defective", copied=False)
    found = handle.capabilities["knockout"]
    assert not found.ok
    assert found.reason == f"cutting one edge does not act on that edge alone (layers {layer})"
    with pytest.raises(CapabilityError, match=r"defective .* attention knockout: cutting one edge does not act"):
        run(handle, query_on(ids, (2, 4)))
    assert lens(handle, query_on(ids, (2, 4)), LensSpec()).rank == 1


def test_a_cut_that_leaks_to_other_rows_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """One mask for the whole batch: the untouched row changes too."""
    from factscope.models import dispatch

    original = dispatch.combine
    monkeypatch.setattr(dispatch, "combine", lambda mask, keep: original(mask, keep.all(dim=0, keepdim=True)))
    found = handle_of(FAMILIES["gpt2"](0)).capabilities["knockout"]
    assert not found.ok
    assert "every layer" in found.reason


def test_a_block_that_adds_something_more_has_no_split() -> None:
    model = FAMILIES["gpt2"](0)
    block = model.transformer.h[2]
    inner = block.forward
    block.forward = lambda hidden, *args, **kwargs: inner(hidden, *args, **kwargs) + 0.3 * hidden.sin()
    found = handle_of(model, copied=False).capabilities["additive"]
    assert not found.ok
    assert "layers 2" in found.reason


def test_a_model_without_blocks_is_refused() -> None:
    model = FAMILIES["gpt2"](0)
    model.config.n_layer = 5
    with pytest.raises(ModelUnsupported, match="no list of 5 blocks"):
        handle_of(model)
