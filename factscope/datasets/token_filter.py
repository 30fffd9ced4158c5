"""Which tokens can be attributes: words that carry meaning, three characters at least, not the subject's own name.

Source: Geva et al. 2023 (arXiv 2304.14767), section 5. The same filter is put to the text about a subject and to the
tokens that a state is projected to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from factscope.tokens import token_text

STOP_WORDS_FILE = Path(__file__).with_name("stop_words.txt")
SHORTEST = 3
"""Characters that a token has at least, spaces around it not counted."""


@cache
def stop_words() -> frozenset[str]:
    """English function words, read once."""
    lines = (line.strip() for line in STOP_WORDS_FILE.read_text(encoding="utf-8").splitlines())
    return frozenset(line for line in lines if line and not line.startswith("#"))


class TokenFilter:
    """Which tokens of a tokenizer are kept.

    Args:
        own: ids that are left out besides, the subject's.
    """

    def __init__(self, tokenizer: Any, own: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._known = dict.fromkeys(own, False)

    def keeps(self, id: int) -> bool:
        """Whether a token is kept."""
        if id not in self._known:
            word = token_text(self._tokenizer, id)[0].strip().lower()
            self._known[id] = len(word) >= SHORTEST and word not in stop_words()
        return self._known[id]


def attribute_tokens(tokenizer: Any, paragraphs: Sequence[str], kept: TokenFilter) -> tuple[int, ...]:
    """The different tokens of some paragraphs that pass the filter, in the order in which they come up."""
    found = (id for paragraph in paragraphs for id in _ids(tokenizer, paragraph))
    return tuple(id for id in dict.fromkeys(found) if kept.keeps(id))


def name_tokens(tokenizer: Any, subject: str, ids: Iterable[int]) -> frozenset[int]:
    """The subject's own tokens: those in the prompt, and its name's with a space before it and without."""
    return frozenset([*ids, *_ids(tokenizer, subject.strip()), *_ids(tokenizer, f" {subject.strip()}")])


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, truncation=False, padding=False, verbose=False)["input_ids"])
