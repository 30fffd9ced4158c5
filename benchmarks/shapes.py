"""The models and prompts that are timed."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from factscope.models.handle import ModelHandle, build_handle
from factscope.queries import Query

BUNDLED = Path(__file__).parents[1] / "factscope" / "demo" / "model"
_SENTENCE = (
    "The Eiffel Tower is located in the city of Paris and the capital of Japan is Tokyo, where Miles Davis plays"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Shape:
    """A model twice: as FactScope holds it, and plain for the reference; the same weights."""

    name: str
    plain: GPT2LMHeadModel
    handle: ModelHandle

    def prompt(self, length: int, seed: int = 0) -> tuple[Tensor, Query]:
        """Token ids [1, length] and the query that has them; words of a sentence, or of a random one."""
        ids = _sentence_ids(length) if self.name.startswith("bundled model") else _random_ids(self, length, seed)
        text = " ".join(f"w{i}" for i in ids)
        return torch.tensor([ids]), Query(prompt=text, subject=" ".join(f"w{i}" for i in ids[1:5]))


def bundled() -> Shape:
    """The bundled model, or where it is not there yet a random one of its shape."""
    if (BUNDLED / "model.safetensors").exists():
        plain = GPT2LMHeadModel.from_pretrained(BUNDLED, attn_implementation="eager", dtype=torch.float32)
        return _shape("bundled model (GPT-2, 8 layers, width 192)", plain)
    config = {"n_layer": 8, "n_embd": 192, "n_head": 6, "vocab_size": 20_000, "n_positions": 64}
    return _shape("random weights of the bundled shape (GPT-2, 8 layers, width 192)", random_gpt2(**config))


def small() -> Shape:
    """Random weights of GPT-2 small."""
    config = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50_257, "n_positions": 1024}
    return _shape("random weights of GPT-2 small (12 layers, width 768)", random_gpt2(**config))


def random_gpt2(*, seed: int = 0, scale: float = 1.5, **shape: int) -> GPT2LMHeadModel:
    """Weights at a scale where a knockout moves probabilities: with the usual ones no comparison could fail."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(GPT2Config(**shape, attn_implementation="eager", bos_token_id=0, eos_token_id=0)).eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                is_embedding = ".wte." in name or ".wpe." in name
                parameter.normal_(std=0.5 if is_embedding else scale / parameter.shape[0] ** 0.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.2)
        ids = torch.randint(0, shape["vocab_size"], (4, 12))
        model.transformer.ln_f.weight *= 4 / float(model(ids).logits[:, -1].std())
        model.transformer.ln_f.bias *= 0
    return model


def _shape(name: str, plain: GPT2LMHeadModel) -> Shape:
    plain.eval().requires_grad_(False)
    size = plain.config.vocab_size
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    handle = build_handle(copy.deepcopy(plain), words, name=name, revision="0", dtype="float32", device="cpu")
    return Shape(name=name, plain=plain, handle=handle)


def _sentence_ids(length: int) -> list[int]:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(BUNDLED / "tokenizer.json"))
    ids = tokenizer(_SENTENCE, add_special_tokens=False)["input_ids"]
    if len(ids) < length:
        raise ValueError(f"the sentence has {len(ids)} tokens, {length} are needed")
    return list(ids[:length])


def _random_ids(shape: Shape, length: int, seed: int) -> list[int]:
    """Of 32 random prompts the one whose top probability is nearest to 0.45, so that it can move both ways."""
    generator = torch.Generator().manual_seed(seed)
    candidates = torch.randint(1, shape.plain.config.vocab_size, (32, length), generator=generator)
    with torch.no_grad():
        top = torch.cat([shape.plain(c[None], logits_to_keep=1).logits[:, -1].softmax(-1).amax(-1) for c in candidates])
    return candidates[int((top - 0.45).abs().argmin())].tolist()
