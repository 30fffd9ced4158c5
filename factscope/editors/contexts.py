"""Texts that stand before a prompt while it is edited, so that the edit holds in other places too.

Source: Meng et al. 2022 (arXiv 2202.05262), section 3.1, and the released code; MEMIT's released code.

1. ``rome``: ten beginnings of at most 5 tokens and ten of at most 10, the start token counted, each token sampled among
   the five most probable, from the start token on. ``memit``: five of at most 10 tokens, begun by The, Therefore,
   Because, I and You.
2. Line breaks and the like become spaces; special tokens, braces and broken characters go.
3. A context is the text, a full stop, and the prompt; the first one is the prompt alone.

They are sampled once for an edit, from its seed, and kept with it: other contexts give another edit. The released code
sets no seed, keeps braces (which break its formatting), and lets a text run on behind its end token.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import Literal

from factscope.editors.prompts import PLAIN
from factscope.errors import CapabilityError, SpecError
from factscope.generation import Sampling, continue_prompt
from factscope.models.handle import ModelHandle

Contexts = Literal["rome", "memit", "none"]
TOP_K = 5
ROME_LENGTHS: tuple[tuple[int, int], ...] = ((5, 10), (10, 10))
"""(most tokens with the start token, how many)."""
SEED_WORDS = ("The", "Therefore", "Because", "I", "You")
MEMIT_LENGTH = 10


def sample(
    model: ModelHandle, contexts: Contexts, seed: int, *, step: Callable[[], None] = lambda: None
) -> tuple[str, ...]:
    """The templates of an edit, ``{}`` first.

    Args:
        step: called before every forward; may raise to end the sampling.

    Raises:
        SpecError: the contexts are unknown.
        CapabilityError: the tokenizer has no token to start from.
    """
    if contexts == "none":
        return (PLAIN,)
    if contexts == "rome":
        return (PLAIN, *_templates(model, _from_start(model, seed, step)))
    if contexts == "memit":
        return (PLAIN, *_templates(model, _from_words(model, seed, step)))
    raise SpecError(f"contexts {contexts!r} are unknown", "choose rome, memit or none")


def _from_start(model: ModelHandle, seed: int, step: Callable[[], None]) -> list[str]:
    start = getattr(model.tokenizer, "bos_token_id", None)
    start = getattr(model.tokenizer, "eos_token_id", None) if start is None else start
    if start is None:
        raise CapabilityError(
            f"the tokenizer of {model.info.name} has no start token, from which contexts could be sampled",
            "choose memit, whose contexts begin with a word, or none",
        )
    texts = []
    for number, (length, count) in enumerate(ROME_LENGTHS):
        sampling = Sampling(top_k=min(TOP_K, model.vocabulary), seed=(seed + number) % 2**32)
        found = continue_prompt(model, (int(start),), length - 1, sampling=sampling, rows=count, step=step)
        texts += [one.text for one in found]
    return texts


def _from_words(model: ModelHandle, seed: int, step: Callable[[], None]) -> list[str]:
    texts = []
    for number, word in enumerate(SEED_WORDS):
        ids = model.tokenizer(word)["input_ids"]
        room = max(0, MEMIT_LENGTH - len(ids))
        sampling = Sampling(top_k=min(TOP_K, model.vocabulary), seed=(seed + number) % 2**32)
        texts.append(word + continue_prompt(model, ids, room, sampling=sampling, step=step)[0].text)
    return texts


def _templates(model: ModelHandle, texts: Sequence[str]) -> list[str]:
    """Each text and a full stop before the prompt; a text of which nothing is left is no context."""
    special = getattr(model.tokenizer, "all_special_tokens", ())
    cleaned = (clean(_without(text, special)) for text in texts)
    return [f"{text.rstrip('.')}. {PLAIN}" for text in cleaned if text.rstrip(".")]


def _without(text: str, names: Sequence[str]) -> str:
    for name in names:
        text = text.replace(name, " ")
    return text


def clean(text: str) -> str:
    """One line, without braces, control characters, and characters that were cut in the middle."""
    normal = unicodedata.normalize("NFKD", text).replace("\ufffd", "").replace("{", " ").replace("}", " ")
    kept = (" " if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in normal)
    return " ".join("".join(kept).split())
