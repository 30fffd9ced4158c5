"""The models and prompts that are timed."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights

from factscope.models.handle import ModelHandle, build_handle
from factscope.queries import Query

BUNDLED = Path(__file__).parents[1] / "factscope" / "demo" / "model"
_SENTENCE = (
    "The Eiffel Tower is located in the city of Paris and the capital of Japan is Tokyo, where Miles Davis plays"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Shape:
    """A model twice: as FactScope holds it, and plain for the reference; the same weights.

    Attributes:
        drawn: prompts drawn so far, by length and seed; choosing one takes some forwards.
    """

    name: str
    plain: GPT2LMHeadModel
    handle: ModelHandle
    drawn: dict[tuple[int, int], list[int]] = field(default_factory=dict, repr=False)

    @property
    def short(self) -> str:
        """The name without its size."""
        return self.name.removeprefix("random weights of ").partition(" (")[0]

    def exact(self) -> Any:
        """The untuned model in float64: a copy, made when two float32 computations are to be judged."""
        return copy.deepcopy(self.plain).double()

    def ids(self, length: int, seed: int = 0) -> list[int]:
        """Token ids: of a sentence, or random ones."""
        if (length, seed) not in self.drawn:
            of_bundled = self.name.startswith("bundled model")
            self.drawn[length, seed] = _sentence_ids(length) if of_bundled else _random_ids(self, length, seed)
        return self.drawn[length, seed]

    def prompt(self, length: int, seed: int = 0) -> tuple[Tensor, Query]:
        """Token ids [1, length] and the query that has them."""
        ids = self.ids(length, seed)
        text = " ".join(f"w{i}" for i in ids)
        return torch.tensor([ids]), Query(prompt=text, subject=" ".join(f"w{i}" for i in ids[1:5]))


def bundled() -> Shape:
    """The bundled model, or where it is not there yet a random one of its shape."""
    if (BUNDLED / "model.safetensors").exists():
        plain = GPT2LMHeadModel.from_pretrained(BUNDLED, attn_implementation="eager", dtype=torch.float32)
        return _shape("bundled model (GPT-2, 8 layers, width 192)", plain)
    config = {"n_layer": 8, "n_embd": 192, "n_head": 6, "vocab_size": 20_000, "n_positions": 64}
    return _shape("random weights of the bundled shape (GPT-2, 8 layers, width 192)", random_gpt2(**config))


VOCABULARY = 50_257
EAGER: dict[str, Any] = {"attn_implementation": "eager"}


def small() -> Shape:
    """Random weights of GPT-2 small."""
    return sized("GPT-2 small", 12, 768)


def medium() -> Shape:
    """Random weights of GPT-2 medium."""
    return sized("GPT-2 medium", 24, 1024)


def xl() -> Shape:
    """Random weights of GPT-2 XL; 6.2 GB in float32, so both ways share one copy."""
    return sized("GPT-2 XL", 48, 1600, n_head=25, copied=False)


def sized(
    name: str,
    n_layer: int,
    n_embd: int,
    *,
    n_head: int | None = None,
    vocab_size: int = VOCABULARY,
    copied: bool = True,
) -> Shape:
    """Random weights of a GPT-2 of any size; heads are 64 wide unless their number is given."""
    plain = random_gpt2(
        n_layer=n_layer, n_embd=n_embd, n_head=n_head or n_embd // 64, vocab_size=vocab_size, n_positions=1024
    )
    return _shape(f"random weights of {name} ({n_layer} layers, width {n_embd})", plain, copied=copied)


def random_gpt2(*, seed: int = 0, scale: float = 1.5, **shape: int) -> GPT2LMHeadModel:
    """Weights at a scale where a knockout moves probabilities: with the usual ones no comparison could fail."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        with no_init_weights():  # drawing 1.6 billion numbers twice takes half a minute
            model = GPT2LMHeadModel(GPT2Config(**shape, **EAGER, bos_token_id=0, eos_token_id=0)).eval()
        model.tie_weights()
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                is_embedding = ".wte." in name or ".wpe." in name
                parameter.normal_(std=0.5 if is_embedding else scale / parameter.shape[0] ** 0.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.2)
            else:
                parameter.fill_(1.0)
        ids = torch.randint(0, shape["vocab_size"], (4, 12))
        model.transformer.ln_f.weight.mul_(4 / float(model(ids).logits[:, -1].std()))
        model.transformer.ln_f.bias.zero_()
    return model


def _shape(name: str, plain: GPT2LMHeadModel, *, copied: bool = True) -> Shape:
    plain.eval().requires_grad_(False)
    size = plain.config.vocab_size
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    own = copy.deepcopy(plain) if copied else plain
    handle = build_handle(own, words, name=name, revision="0", dtype="float32", device="cpu")
    return Shape(name=name, plain=plain, handle=handle)


def _sentence_ids(length: int) -> list[int]:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(BUNDLED / "tokenizer.json"))
    ids = tokenizer(_SENTENCE, add_special_tokens=False)["input_ids"]
    if len(ids) < length:
        raise ValueError(f"the sentence has {len(ids)} tokens, {length} are needed")
    return list(ids[:length])


def _random_ids(shape: Shape, length: int, seed: int) -> list[int]:
    """Of some random prompts the one whose top probability is nearest to 0.45, so that it can move both ways.

    There are 32, or 8 where a forward takes long.
    """
    generator = torch.Generator().manual_seed(seed)
    candidates = torch.randint(
        1, shape.plain.config.vocab_size, (8 if shape.plain.config.n_layer > 24 else 32, length), generator=generator
    )
    with torch.no_grad():
        logits = [shape.plain(some, use_cache=False, logits_to_keep=1).logits[:, -1] for some in candidates.split(8)]
        top = torch.cat(logits).softmax(dim=-1).amax(dim=-1)
    return candidates[int((top - 0.45).abs().argmin())].tolist()
