"""Deep tiny models whose knockouts are visible, a tokenizer with one word per id, and prompts made of such words."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from factscope.models.creation import creating
from factscope.models.handle import ModelHandle, build_handle
from factscope.queries import Query
from tests.oracle import plain_gpt2, plain_llama
from tests.oracle.plain import Edge, Trace, float64
from tests.tiny_models import VOCAB_SIZE, redraw, tiny_prompt

ROUNDING = 1e-5
"""How far a float32 probability may be from the float64 one."""
MOVES = 0.05
"""A cell counts as visible if the probability moves by more."""


@lru_cache
def word_tokenizer(size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Word ``w17`` is token 17; no special tokens are added."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def words(ids: Sequence[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def handle_of(
    model: PreTrainedModel, name: str = "tiny", dtype: str = "float32", *, copied: bool = True
) -> ModelHandle:
    """A handle of a copy: the given model stays without hooks."""
    own = copy.deepcopy(model) if copied else model
    size = int(model.get_input_embeddings().num_embeddings)
    return build_handle(own, word_tokenizer(size), name=name, revision="0", dtype=dtype, device="cpu")


def query_on(ids: Sequence[int], subject: tuple[int, int], answer: Sequence[int] = (), **more: Any) -> Query:
    """The query with these very tokens; the subject covers positions [start, stop)."""
    return Query(prompt=words(ids), subject=words(ids[slice(*subject)]), answer=words(answer) or None, **more)


def distinct_prompt(model: PreTrainedModel, length: int, seed: int) -> list[int]:
    """Tokens that all differ, so that a subject occurs once, with an answer neither certain nor lost."""
    for attempt in range(100):
        ids = tiny_prompt(model, length, seed=1000 * seed + attempt)[0].tolist()
        if len(set(ids)) == length:
            return ids
    raise AssertionError("no prompt of different tokens")


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A model, its handle and its plain computation."""

    model: PreTrainedModel
    plain: Any

    @cached_property
    def handle(self) -> ModelHandle:
        return handle_of(self.model, name=self.model.config.model_type)

    @cached_property
    def state(self) -> dict[str, Tensor]:
        return float64(self.model.state_dict())

    @property
    def n_layers(self) -> int:
        return int(self.model.config.num_hidden_layers)

    @property
    def n_heads(self) -> int:
        return int(self.model.config.num_attention_heads)

    def trace(self, ids: Sequence[int], forbidden: Collection[Edge] = (), **changes: Any) -> Trace:
        """One plain forward; ``changes`` are ``embed`` and ``puts``."""
        if self.plain is plain_gpt2:
            return plain_gpt2.run(self.state, ids, forbidden, n_heads=self.n_heads, **changes)
        config = self.model.config
        run = partial(plain_llama.run, n_heads=self.n_heads, n_groups=config.num_key_value_heads)
        return run(self.state, ids, forbidden, eps=config.rms_norm_eps, **changes)

    def normed(self, states: Tensor) -> Tensor:
        return self.plain.normed(self.state, states)

    def raw(self, states: Tensor) -> Tensor:
        return self.plain.raw(self.state, states)


@lru_cache
def subject(family: str, layers: int = 4, seed: int = 0, scale: float = 1.5) -> Subject:
    """A random GPT-2 (heads of 9) or Llama (8 heads in 2 groups), weights scaled until knockouts show."""
    settings: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    if family == "gpt2":
        settings |= {"n_embd": 36, "n_layer": layers, "n_head": 4, "n_positions": 64}
    else:
        settings |= {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": 8}
        settings |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
    config = CONFIG_MAPPING[family](**settings)
    with creating(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    redraw(model, seed, scale=scale)
    return Subject(model=model.eval().requires_grad_(False), plain=plain_gpt2 if family == "gpt2" else plain_llama)
