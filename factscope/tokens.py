"""Text to positions: the tokens of a prompt, the subject's among them, and the target.

1. The prompt is checked (characters that no tokenizer should see, length) and its trailing white space removed: a space
   before the answer belongs to the answer's first token.
2. It is tokenized once as a whole. Pieces are never tokenized apart and added up: tokens merge across any border.
3. Each token gets its text by incremental decoding: the texts of all tokens that are not special, put together, are the
   decoded prompt. Where several tokens share one character, their bytes are written out: ``<E6><9D>``.
4. The subject's characters are found in the prompt; its span is the range from the first to the last token that
   overlaps them, by the offsets of a fast tokenizer or, where there are none, by the decoded texts.
5. Every position gets one role: ``last`` (the read-out), else ``special``, else ``subject``, else ``relation``.

The tokenizer is passed in; nothing here needs torch.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

from factscope.errors import PromptError, SpecError, SubjectError, TargetError
from factscope.queries import Query

Role = Literal["special", "subject", "relation", "last"]

MAX_CHARACTERS = 4000
_MAX_ANSWER_CHARACTERS = 400
_LONGEST_GROUP = 32  # tokens that may share characters before the decoded text is taken as it is
_SUGGESTION_LIKENESS = 0.75
_REPLACEMENT = "\ufffd"
_ALLOWED_CONTROLS = frozenset("\t\n\r")
_JOINERS = frozenset("\u200c\u200d")
_BYTE_NAME = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_POSITION = re.compile(r"([0-9]{1,9})(?:\s*-\s*([0-9]{1,9}))?")
_NAMED_POSITIONS = "subject, subject-first, subject-last, subject-after, relation, last, special"
# Scripts that put no space between words: Thai, Lao, Myanmar, Khmer, kana, Han, full-width forms.
_SPACELESS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3000-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef"
    "\U00020000-\U0003ffff]"
)


@dataclass(frozen=True, kw_only=True)
class Token:
    """One position of a tokenized prompt.

    Attributes:
        position: from 0, special tokens counted.
        id: the token's id.
        text: the piece of the decoded prompt that this token adds; bytes of a character that it shares with its
            neighbours as ``<E6>``; the name of a special token.
        display: ``text`` for a screen: spaces at its ends as ``·``, a newline as ``↵``, invisible characters by number.
        role: ``last`` for the read-out whatever else it is, then ``special``, ``subject``, ``relation``.
    """

    position: int
    id: int
    text: str
    display: str
    role: Role


@dataclass(frozen=True, kw_only=True)
class Target:
    """The tokens whose probability is asked for.

    Attributes:
        ids: the answer's tokens as a continuation of the prompt, at least one.
        text: what they spell, leading space included.
    """

    ids: tuple[int, ...]
    text: str

    @property
    def id(self) -> int:
        """The first token's id."""
        return self.ids[0]

    @property
    def n_tokens(self) -> int:
        """How many tokens the answer has."""
        return len(self.ids)


@dataclass(frozen=True, kw_only=True)
class TokenizedQuery:
    """A query as the model reads it.

    Attributes:
        query: the query with its prompt as it was tokenized: trailing white space removed, one kind of newline.
        ids: the token ids, special tokens included.
        tokens: one entry per id.
        subject: the subject's positions [start, stop), None where the query has no subject.
        warnings: sentences for the user.
        exact_offsets: whether the tokenizer gave character offsets; False means that the subject was found by decoding
            the tokens one after another.
    """

    query: Query
    ids: tuple[int, ...]
    tokens: tuple[Token, ...]
    subject: tuple[int, int] | None
    warnings: tuple[str, ...]
    exact_offsets: bool

    @property
    def last(self) -> int:
        """The read-out position."""
        return len(self.ids) - 1

    @property
    def subject_text(self) -> str | None:
        """The subject in words: as it was named, or what the span chosen by hand spells."""
        if self.subject is None or self.query.span is None:
            return self.query.subject
        return "".join(token.text for token in self.tokens[slice(*self.subject)]).strip()

    def positions(self, name: str) -> tuple[int, ...]:
        """The positions that a name stands for, in order.

        ``subject``: the subject's positions without the last position of the prompt, which is the read-out; only a
        subject that is nothing but the last position keeps it. ``subject-first``, ``subject-last``, ``subject-after``:
        the ends of the subject's span and the position behind it, the read-out included. ``relation``: all that is not
        subject, last or special; may be empty. ``special``: tokens such as BOS; may be empty. ``last``: the read-out.
        ``7`` is one position and ``3-5`` the positions 3, 4 and 5, whatever their role.

        Raises:
            SpecError: the name is none of these, or a position lies outside the prompt.
            SubjectError: the query has no subject.
        """
        key = name.strip().lower()
        if key == "last":
            return (self.last,)
        if key in ("relation", "special"):
            return tuple(token.position for token in self.tokens if token.role == key)
        if key.startswith("subject"):
            return self._subject_positions(name, key)
        found = _POSITION.fullmatch(key)
        if found is None:
            raise SpecError(f"{_quote(name)} names no positions", f"use one of {_NAMED_POSITIONS}, 7, or 3-5")
        first = int(found[1])
        final = int(found[2] or first)
        if final > self.last:
            raise SpecError(
                f"position {final} is not in the prompt, which has {len(self.ids)} tokens", f"use 0 to {self.last}"
            )
        if first > final:
            raise SpecError(f"the range {first}-{final} runs backwards", f"write {final}-{first}")
        return tuple(range(first, final + 1))

    def _subject_positions(self, name: str, key: str) -> tuple[int, ...]:
        if key not in ("subject", "subject-first", "subject-last", "subject-after"):
            raise SpecError(f"{_quote(name)} names no positions", f"use one of {_NAMED_POSITIONS}, 7, or 3-5")
        if self.subject is None:
            raise SubjectError(
                f"{_quote(name)} needs a subject, and the query has none",
                "give the subject's text or choose its tokens",
            )
        start, stop = self.subject
        if key == "subject-first":
            return (start,)
        if key == "subject-last":
            return (stop - 1,)
        if key == "subject-after":
            if stop > self.last:
                raise SpecError(
                    "subject-after is not in the prompt, whose last token ends the subject", "use subject-last or last"
                )
            return (stop,)
        inner = tuple(token.position for token in self.tokens[start:stop] if token.role == "subject")
        return inner or (stop - 1,)


def tokenize(
    query: Query, tokenizer: Any, *, max_tokens: int | None = None, max_characters: int = MAX_CHARACTERS
) -> TokenizedQuery:
    """Turn a query into positions.

    Args:
        query: what is asked.
        tokenizer: a transformers tokenizer, fast or slow.
        max_tokens: the longest prompt that the model reads; None sets no limit.
        max_characters: the longest prompt that is tokenized at all.

    Raises:
        PromptError: the prompt is empty, too long, or holds characters that are not text.
        SubjectError: the subject is empty, missing, ambiguous, the whole prompt, or covers no token.
        SpecError: the span chosen by hand is not in the prompt, or ``bos`` cannot be met.
        TargetError: the answer is empty or cannot be tokenized.
    """
    prompt, warnings = _clean_prompt(query.prompt, max_characters)
    encoded = _encode_prompt(tokenizer, prompt, query.bos)
    ids = encoded.ids
    if max_tokens is not None and len(ids) > max_tokens:
        raise PromptError(
            f"the prompt has {len(ids)} tokens and the model reads at most {max_tokens}", "shorten the prompt"
        )
    content = [position for position, special in enumerate(encoded.special) if not special]
    decoded, pieces = _pieces(tokenizer, [ids[position] for position in content])
    layout = _Layout.of(prompt, decoded, pieces, encoded, content)
    cleaned = replace(query, prompt=prompt)
    subject, extra = _find_subject(cleaned, layout, encoded)
    warnings += [*encoded.warnings, *_content_warnings(tokenizer, encoded, layout, prompt, decoded), *extra]
    if subject is not None and subject[0] == 0:
        warnings.append(
            "The subject starts at position 0 with no BOS token before it. Many models attend to position 0 whatever"
            " stands there, so the subject's effect and that position's mix; switch BOS on to part them."
        )
    result = TokenizedQuery(
        query=cleaned,
        ids=ids,
        tokens=tuple(_tokens(tokenizer, encoded, dict(zip(content, pieces, strict=True)), subject)),
        subject=subject,
        warnings=(),
        exact_offsets=layout.exact,
    )
    if query.answer is not None:
        warnings += _answer_warnings(tokenizer, result, query.answer)
    return replace(result, warnings=tuple(warnings))


def answer_target(tokenizer: Any, tokenized: TokenizedQuery, answer: str, *, what: str = "answer") -> Target:
    """The tokens of an answer as a continuation of this very prompt.

    The prompt is tokenized with and without the answer and the difference taken, if the first is a prefix of the
    second. Where it is not (a token merges across the border), the answer is tokenized alone, with or without its
    leading space, whichever spells the answer behind the prompt. No space is put between two characters of scripts
    that write none, nor behind an opening bracket or quotation mark.

    Args:
        what: how a refusal calls it, "answer" or "foil".

    Raises:
        TargetError: the answer is empty, too long, not text, or not in the tokenizer's vocabulary.
    """
    words = answer.strip()
    if not words:
        raise TargetError(f"the {what} is empty", f"type the {what}, or leave it out")
    if len(words) > _MAX_ANSWER_CHARACTERS:
        raise TargetError(
            f"the {what} has {len(words)} characters and at most {_MAX_ANSWER_CHARACTERS} are read", "shorten it"
        )
    bad = _bad_character(words)
    if bad is not None:
        raise TargetError(
            f"the {what} {_quote(words)} contains {_code_point(words[bad])}, which is not text", "remove it"
        )
    prompt = tokenized.query.prompt
    continuation = _gap(prompt, words) + words
    base, _ = _encode(tokenizer, prompt, special=False)
    joined, _ = _encode(tokenizer, prompt + continuation, special=False)
    ids = joined[len(base) :]
    if not ids or joined[: len(base)] != base:
        ids = _tokenized_alone(tokenizer, base, words, continuation)
    if not ids:
        raise TargetError(f"the tokenizer makes no token of the answer {_quote(words)}", f"choose another {what}")
    if ids[0] == _unknown_id(tokenizer):
        raise TargetError(
            f"the {what} {_quote(words)} is not in the tokenizer's vocabulary",
            f"choose another {what} or another model",
        )
    known = _decode(tokenizer, base)
    spelled = _decode(tokenizer, [*base, *ids])
    text = spelled[len(known) :] if spelled.startswith(known) else continuation
    return Target(ids=ids, text=text or continuation)


def token_text(tokenizer: Any, id: int) -> tuple[str, str]:
    """Text and display of one token out of context, as in a list of the most probable next tokens.

    The leading space is kept where a decoder drops it, bytes that are no whole character are written ``<E2>``, and an
    id that the tokenizer does not know is ``<token 50300>``.
    """
    name = _name(tokenizer, id)
    if name is None:
        unknown = f"<token {id}>"
        return unknown, unknown
    if id in _special_ids(tokenizer):
        return name, name
    text = _decode(tokenizer, [id])
    if _REPLACEMENT in text:
        for scheme in (_byte_level_bytes, _plain_bytes):
            data = scheme(name)
            if data is not None and data.decode(errors="replace") == text:
                return _both(_written_out(data))
        return _both(name.replace("▁", " "))
    if name.startswith("▁") and not text.startswith(" "):
        return _both(" " + text)
    return _both(text or name)


def find_occurrences(prompt: str, subject: str) -> list[int]:
    """Where the subject starts in the prompt, in characters; overlapping occurrences count.

    The exact text is looked for first; if it is nowhere, canonically equivalent text (composed or decomposed accents),
    and then compatible text (full-width letters, ligatures).
    """
    return [start for start, _ in find_spans(prompt, subject)]


def find_spans(prompt: str, subject: str) -> list[tuple[int, int]]:
    """Characters [start, stop) of each occurrence that ``find_occurrences`` finds: in another form of Unicode an
    occurrence may be longer or shorter than the subject as it was typed.
    """
    return _occurrences(prompt, subject)


# ---------------------------------------------------------------------------------------------------------- prompt


def _clean_prompt(prompt: str, max_characters: int) -> tuple[str, list[str]]:
    if not prompt:
        raise PromptError("the prompt is empty", "type a sentence that ends right before the answer")
    if len(prompt) > max_characters:
        raise PromptError(
            f"the prompt has {len(prompt):,} characters and at most {max_characters:,} are read", "shorten the prompt"
        )
    bad = _bad_character(prompt)
    if bad is not None:
        kind = "half of a surrogate pair" if unicodedata.category(prompt[bad]) == "Cs" else "a control character"
        raise PromptError(
            f"the prompt contains {_code_point(prompt[bad])}, {kind}, at character {bad}, which is not text",
            "remove it",
        )
    if not prompt.strip():
        raise PromptError(
            f"the prompt {_quote(prompt)} is only white space", "type a sentence that ends right before the answer"
        )
    warnings = []
    plain = _unix_newlines(prompt)
    if plain != prompt:
        warnings.append("Carriage returns in the prompt were read as newlines.")
    stripped = plain.rstrip()
    if stripped != plain:
        warnings.append(
            f"The prompt ended in white space ({_display(plain[len(stripped) :])}), which was removed: the space before"
            " the answer belongs to the answer's first token."
        )
    return stripped, warnings


def _unix_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _bad_character(text: str) -> int | None:
    """The index of the first control character or lone surrogate."""
    return next(
        (
            index
            for index, character in enumerate(text)
            if unicodedata.category(character) in ("Cc", "Cs") and character not in _ALLOWED_CONTROLS
        ),
        None,
    )


# -------------------------------------------------------------------------------------------------------- encoding


class _Encoded(NamedTuple):
    """A prompt in ids: which of them are special, and where each of the others lies in the prompt's characters."""

    ids: tuple[int, ...]
    special: tuple[bool, ...]
    offsets: tuple[tuple[int, int], ...] | None
    warnings: tuple[str, ...]


def _encode(tokenizer: Any, text: str, *, special: bool) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...] | None]:
    """Ids, and character offsets where the tokenizer has them (a slow one leaves them out without a word)."""
    options = {"return_offsets_mapping": True} if getattr(tokenizer, "is_fast", False) else {}
    encoding = tokenizer(text, add_special_tokens=special, truncation=False, padding=False, verbose=False, **options)
    offsets = encoding.get("offset_mapping")
    return tuple(encoding["input_ids"]), None if offsets is None else tuple((a, b) for a, b in offsets)


def _encode_prompt(tokenizer: Any, prompt: str, bos: str) -> _Encoded:
    if bos not in ("auto", "yes", "no"):
        raise SpecError(f"bos {_quote(bos)} is unknown", "use auto, yes or no")
    bare, offsets = _encode(tokenizer, prompt, special=False)
    if not bare:
        raise PromptError(f"the tokenizer makes no token of the prompt {_quote(prompt)}", "type other words")
    warnings: list[str] = []
    before: tuple[int, ...] = ()
    if bos != "no":
        full, _ = _encode(tokenizer, prompt, special=True)
        before, after = _added(full, bare)
        if after:
            names = " ".join(_name(tokenizer, id) or str(id) for id in after)
            warnings.append(
                f"The tokenizer ends each text with {names}; it was left out, since the answer follows here."
            )
    if bos == "yes":
        start = _start_id(tokenizer)
        if (before or bare)[0] != start:
            before = (start, *before)
    by_id = _special_ids(tokenizer)
    typed = sorted({_name(tokenizer, id) or str(id) for id in bare if id in by_id})
    if typed:
        doubled = " right behind the same token put there by the tokenizer" if before and bare[0] == before[-1] else ""
        warnings.append(
            f"The prompt itself contains {', '.join(typed)}{doubled}: the model reads a special token, not text,"
            " and it belongs to no set of positions."
        )
    blanks = ((0, 0),) * len(before)
    return _Encoded(
        ids=before + bare,
        special=(True,) * len(before) + tuple(id in by_id for id in bare),
        offsets=None if offsets is None else blanks + offsets,
        warnings=tuple(warnings),
    )


def _added(full: tuple[int, ...], bare: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What a tokenizer puts before and behind a text by itself."""
    for start in range(len(full) - len(bare), -1, -1):
        stop = start + len(bare)
        if full[start:stop] == bare:
            return full[:start], full[stop:]
    return (), ()


def _start_id(tokenizer: Any) -> int:
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise SpecError("bos yes cannot be met: this tokenizer has neither a BOS nor an EOS token", "use bos auto")
    return int(start)


def _special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids that are no text. The unknown token is text: it stands for a word of the prompt."""
    return frozenset(tokenizer.all_special_ids) - {_unknown_id(tokenizer)}


def _unknown_id(tokenizer: Any) -> int | None:
    """The id for text outside the vocabulary; None where it doubles as BOS or EOS (GPT-2) and never stands for text."""
    unknown = tokenizer.unk_token_id
    return None if unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id) else unknown


# -------------------------------------------------------------------------------------------------------- decoding


class _Piece(NamedTuple):
    """A token's text and the characters [start, stop) of the decoded text that it has a part in."""

    text: str
    start: int
    stop: int


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""


def _name(tokenizer: Any, id: int) -> str | None:
    """The vocabulary's own name of a token; None for an id outside the vocabulary."""
    try:
        return tokenizer.convert_ids_to_tokens(id)
    except (IndexError, KeyError, OverflowError, ValueError):
        return None


def _pieces(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[_Piece]]:
    """Decode token by token: what each adds to the text before it.

    A group is as many tokens as it takes to reach a whole character. Each group is decoded behind the one before it,
    since many decoders treat the start of a text in their own way.
    """
    pieces: list[_Piece] = []
    decoded = ""
    context = start = 0
    known = ""
    for stop in range(1, len(ids) + 1):
        seen = _decode(tokenizer, ids[context:stop])
        group = seen[len(known) :]
        whole = seen.startswith(known) and not seen.endswith(_REPLACEMENT)
        split = (
            [_Piece(group, len(decoded), len(decoded) + len(group))]
            if whole and stop - start == 1
            else _split_group(tokenizer, ids[start:stop], group, len(decoded))
        )
        if split is None and not whole and stop < len(ids) and stop - start < _LONGEST_GROUP:
            continue
        pieces += split or _undivided(group, stop - start, len(decoded))
        decoded += group
        context, start = start, stop
        known = _decode(tokenizer, ids[context:start])
    return decoded, pieces


def _undivided(group: str, n_tokens: int, offset: int) -> list[_Piece]:
    """Tokens that cannot be told apart: all overlap the whole group, the last one carries its text."""
    end = offset + len(group)
    return [_Piece("", offset, end)] * (n_tokens - 1) + [_Piece(group, offset, end)]


def _split_group(tokenizer: Any, ids: Sequence[int], group: str, offset: int) -> list[_Piece] | None:
    """Divide a group's text by the bytes that its tokens' names stand for; None if they do not spell the group."""
    names = [_name(tokenizer, id) or "" for id in ids]
    wanted = group.encode(errors="surrogatepass")
    for scheme in (_byte_level_bytes, _plain_bytes):
        parts = [scheme(name) for name in names]
        if any(part is None for part in parts):
            continue
        known = [part for part in parts if part is not None]
        if b"".join(known) == b" " + wanted:  # decoders drop the space at the start of a text
            known = [known[0][1:], *known[1:]]
        if b"".join(known) == wanted:
            return list(_byte_pieces(known, group, offset))
    return None


def _byte_pieces(parts: Sequence[bytes], group: str, offset: int) -> Iterable[_Piece]:
    owner = [index for index, character in enumerate(group) for _ in character.encode(errors="surrogatepass")]
    done = 0
    for part in parts:
        covered = owner[done : done + len(part)]
        start = covered[0] if covered else (owner[done] if done < len(owner) else len(group))
        stop = covered[-1] + 1 if covered else start
        yield _Piece(_written_out(part), offset + start, offset + stop)
        done += len(part)


def _gpt2_bytes() -> dict[str, int]:
    """GPT-2's names of the 256 bytes: printable Latin-1 for itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_GPT2_BYTES = _gpt2_bytes()


def _byte_level_bytes(name: str) -> bytes | None:
    """The bytes of a byte-level name such as ``Ġæ``; None if it cannot be one."""
    values = [_GPT2_BYTES.get(character) for character in name]
    return None if None in values else bytes(value for value in values if value is not None)


def _plain_bytes(name: str) -> bytes | None:
    """The bytes of any other name: ``<0xE2>``, or text with ``▁`` for a space."""
    found = _BYTE_NAME.fullmatch(name)
    return bytes([int(found[1], 16)]) if found else name.replace("▁", " ").encode(errors="surrogatepass")


def _written_out(data: bytes) -> str:
    """UTF-8 to text, bytes that are no whole character as ``<E2>``."""
    text = data.decode(errors="surrogateescape")
    return "".join(
        f"<{ord(character) - 0xDC00:02X}>" if 0xDC80 <= ord(character) <= 0xDCFF else character for character in text
    )


# -------------------------------------------------------------------------------------------------- what is on screen


def _both(text: str) -> tuple[str, str]:
    return text, _display(text)


def _display(text: str) -> str:
    """Text with marks for what cannot be seen: ``·`` for spaces at its ends, ``↵`` for newlines, code points."""
    inner = text.strip(" ")
    if not inner:
        return "·" * len(text)
    lead = len(text) - len(text.lstrip(" "))
    tail = len(text) - len(text.rstrip(" "))
    shown = "".join(_shown(character, alone=len(inner) == 1) for character in inner)
    bare = "◌" if unicodedata.combining(inner[0]) else ""  # an accent needs something to stand on
    return "·" * lead + bare + shown + "·" * tail


def _shown(character: str, *, alone: bool) -> str:
    if character in "\n\t":
        return "↵" if character == "\n" else "⇥"
    if character in _JOINERS and not alone:
        return character
    category = unicodedata.category(character)
    hidden = category in ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp") or (category == "Zs" and character != " ")
    return _code_point(character) if hidden else character


def _code_point(character: str) -> str:
    return f"<U+{ord(character):04X}>"


def _quote(text: str, limit: int = 60) -> str:
    """Text for a sentence: in quotation marks, cut, nothing in it that cannot be printed."""
    cut = text if len(text) <= limit else text[: limit - 1] + "…"
    return '"' + "".join(_shown(character, alone=False) for character in cut) + '"'


# ------------------------------------------------------------------------------------------------- roles and warnings


def _tokens(
    tokenizer: Any, encoded: _Encoded, pieces: dict[int, _Piece], subject: tuple[int, int] | None
) -> Iterable[Token]:
    inside = range(*subject) if subject else range(0)
    last = len(encoded.ids) - 1
    for position, (id, special) in enumerate(zip(encoded.ids, encoded.special, strict=True)):
        name = _name(tokenizer, id) or f"<token {id}>"
        text = name if special else pieces[position].text
        role: Role = "relation"
        if position == last:
            role = "last"
        elif special:
            role = "special"
        elif position in inside:
            role = "subject"
        display = name if special else _display(text or name.replace("▁", " ").replace("Ġ", " "))
        yield Token(position=position, id=id, text=text, display=display, role=role)


def _content_warnings(tokenizer: Any, encoded: _Encoded, layout: _Layout, prompt: str, decoded: str) -> list[str]:
    warnings = []
    unknown = encoded.ids.count(_unknown_id(tokenizer))
    if unknown:
        warnings.append(
            f"{unknown} of the {len(encoded.ids)} tokens stand for words that are not in the tokenizer's vocabulary."
        )
    if not layout.exact and decoded.split() != prompt.split():
        warnings.append(f"The tokenizer reads the prompt as {_quote(decoded, 200)}.")
    return warnings


def _answer_warnings(tokenizer: Any, tokenized: TokenizedQuery, answer: str) -> list[str]:
    target = answer_target(tokenizer, tokenized, answer)
    if target.n_tokens == 1 or tokenized.query.score == "sequence":
        return []
    first = token_text(tokenizer, target.id)[1]
    return [
        f"The answer {_quote(answer.strip())} has {target.n_tokens} tokens; the score is that of the first,"
        f" {_quote(first)}."
    ]


# -------------------------------------------------------------------------------------------------------- the subject


class _Layout(NamedTuple):
    """Where the positions that are not special lie in a text.

    Attributes:
        text: the prompt, or the decoded prompt where the tokenizer gives no offsets.
        spans: characters [start, stop) per position, white space stripped; empty for a token of white space.
        exact: whether the tokenizer gave the offsets.
    """

    text: str
    spans: dict[int, tuple[int, int]]
    exact: bool

    @classmethod
    def of(
        cls, prompt: str, decoded: str, pieces: Sequence[_Piece], encoded: _Encoded, content: Sequence[int]
    ) -> _Layout:
        offsets = encoded.offsets
        blank = {
            position
            for position, piece in zip(content, pieces, strict=True)
            if not decoded[piece.start : piece.stop].strip()
        }
        if offsets is None:
            spans = {position: (piece.start, piece.stop) for position, piece in zip(content, pieces, strict=True)}
        else:
            spans = {position: offsets[position] for position in content}
        text = decoded if offsets is None else prompt
        return cls(
            text=text,
            spans={
                position: (start, start) if position in blank else _stripped(text, start, stop)
                for position, (start, stop) in spans.items()
            },
            exact=offsets is not None,
        )


def _stripped(text: str, start: int, stop: int) -> tuple[int, int]:
    piece = text[start:stop]
    left = start + len(piece) - len(piece.lstrip())
    return left, max(left, stop - (len(piece) - len(piece.rstrip())))


def _find_subject(query: Query, layout: _Layout, encoded: _Encoded) -> tuple[tuple[int, int] | None, list[str]]:
    """The subject's positions, and a warning if its tokens hold characters beside it."""
    if query.span is not None:
        return _chosen_span(query.span, layout, encoded), []
    if query.subject is None:
        return None, []
    subject = _unix_newlines(query.subject).strip()
    if not subject:
        raise SubjectError("the subject is empty", "type the words of the prompt that name the subject")
    start, stop = _subject_characters(query, subject, layout)
    inside = [position for position, (a, b) in layout.spans.items() if a < b and a < stop and start < b]
    if not inside:
        raise SubjectError(f"the subject {_quote(subject)} covers no token of the prompt", "choose other words")
    span = inside[0], inside[-1] + 1
    _refuse_everything(span, layout, _quote(subject))
    covered = (
        min(layout.spans[position][0] for position in inside),
        max(layout.spans[position][1] for position in inside),
    )
    if covered[0] >= start and covered[1] <= stop:
        return span, []
    return span, [
        f"Tokens merge across the border of the subject: its tokens cover {_quote(layout.text[slice(*covered)])}, not"
        f" only {_quote(subject)}."
    ]


def _chosen_span(span: tuple[int, int], layout: _Layout, encoded: _Encoded) -> tuple[int, int]:
    start, stop = span
    n_tokens = len(encoded.ids)
    if not 0 <= start < stop <= n_tokens:
        raise SpecError(
            f"the subject span {start} to {stop} is not a range of the prompt, which has {n_tokens} tokens",
            f"choose a start from 0 to {n_tokens - 1} and a larger stop up to {n_tokens}",
        )
    special = [position for position in range(start, stop) if encoded.special[position]]
    if special:
        raise SpecError(
            f"the subject span {start} to {stop} contains position {special[0]}, a special token, which no set has",
            "choose a span without it",
        )
    _refuse_everything((start, stop), layout, f"span {start} to {stop}")
    return start, stop


def _refuse_everything(span: tuple[int, int], layout: _Layout, subject: str) -> None:
    if all(position in range(*span) or a == b for position, (a, b) in layout.spans.items()):
        raise SubjectError(
            f"the subject {subject} covers every token of the prompt and leaves nothing that asks for an answer",
            "add the relation to the prompt, as in 'The Eiffel Tower is located in the city of'",
        )


def _subject_characters(query: Query, subject: str, layout: _Layout) -> tuple[int, int]:
    """Characters [start, stop) of the chosen occurrence in the layout's text."""
    prompt = query.prompt
    found = _occurrences(prompt, subject)
    if not found:
        raise SubjectError(f"the subject {_quote(subject)} is not in the prompt", _suggestion(prompt, subject))
    if query.occurrence is None and len(found) > 1:
        raise SubjectError(
            f"the subject {_quote(subject)} occurs {len(found)} times in the prompt ({_listed(prompt, found)})",
            f"say which one is meant, occurrence 1 to {len(found)}",
        )
    index = 0 if query.occurrence is None else query.occurrence - 1
    if not 0 <= index < len(found):
        raise SubjectError(
            f"occurrence {query.occurrence} of the subject {_quote(subject)} does not exist: the prompt has"
            f" {len(found)} ({_listed(prompt, found)})",
            "use occurrence 1" if len(found) == 1 else f"use occurrence 1 to {len(found)}",
        )
    if layout.text == prompt:
        return found[index]
    read = _occurrences(layout.text, subject)
    if index >= len(read):
        raise SubjectError(
            f"the tokenizer reads the prompt as {_quote(layout.text, 200)}, where the subject {_quote(subject)} is"
            " missing",
            "choose the subject's tokens by hand",
        )
    return read[index]


def _listed(prompt: str, found: Sequence[tuple[int, int]], most: int = 5) -> str:
    shown = [
        f"{number} at character {start}: {_quote(prompt[max(0, start - 8) : stop + 8])}"
        for number, (start, stop) in enumerate(found[:most], start=1)
    ]
    return ", ".join([*shown, "…"] if len(found) > most else shown)


def _suggestion(prompt: str, subject: str) -> str:
    """What to try for a subject that is not there: the same words in other letters, or words much like them."""
    loose = _occurrences_in_form(prompt, subject, _loosely)
    if loose:
        return f"did you mean {_quote(prompt[slice(*loose[0])])}?"
    borders = [(found.start(), found.end()) for found in re.finditer(r"\S+", prompt)]
    n_words = len(subject.split())
    groups = [
        prompt[first[0] : last[1]].strip(".,;:!?()'\"")
        for first, last in zip(borders, borders[n_words - 1 :], strict=False)
    ]
    close = difflib.get_close_matches(subject, groups, n=1, cutoff=_SUGGESTION_LIKENESS)
    return f"did you mean {_quote(close[0])}?" if close else "copy the subject from the prompt"


# ------------------------------------------------------------------------------------------------- finding characters


def _occurrences(text: str, wanted: str) -> list[tuple[int, int]]:
    """Characters [start, stop) of each occurrence, in the strictest form of Unicode that has any."""
    if not wanted:
        return []
    forms: tuple[Callable[[str], str], ...] = (
        str,
        partial(unicodedata.normalize, "NFD"),
        partial(unicodedata.normalize, "NFKD"),
    )
    for form in forms:
        found = _occurrences_in_form(text, wanted, form)
        if found:
            return found
    return []


def _occurrences_in_form(text: str, wanted: str, form: Callable[[str], str]) -> list[tuple[int, int]]:
    """Occurrences after each character has been rewritten by ``form``; a character is never split."""
    owners: list[int] = []
    letters: list[str] = []
    for index, character in enumerate(text):
        for letter in form(character):
            owners.append(index)
            letters.append(letter)
    if form is not str:
        letters, owners = _canonical_order(letters, owners)
    needle = "".join(form(character) for character in wanted)
    if form is not str:
        needle = "".join(_canonical_order(list(needle), list(range(len(needle))))[0])
    if not needle:
        return []
    haystack = "".join(letters)
    found = []
    at = haystack.find(needle)
    while at >= 0:
        end = at + len(needle)
        splits_first = at > 0 and owners[at - 1] == owners[at]
        splits_last = end < len(owners) and (owners[end] == owners[end - 1] or _joins(haystack[end], form))
        if not splits_first and not splits_last:
            inside = owners[at:end]
            found.append((min(inside), max(inside) + 1))
        at = haystack.find(needle, at + 1)
    return found


def _joins(letter: str, form: Callable[[str], str]) -> bool:
    """Whether a letter is an accent on the one before it, so that a match before it would cut a character."""
    return form is not str and unicodedata.combining(letter) != 0


def _canonical_order(letters: list[str], owners: list[int]) -> tuple[list[str], list[int]]:
    """Accents on one letter in Unicode's own order, as normalising a whole text would put them."""
    order: list[int] = []
    run: list[int] = []
    classes = [unicodedata.combining(letter) for letter in letters]
    for index, rank in enumerate(classes):
        if rank == 0:
            order += sorted(run, key=classes.__getitem__)
            order.append(index)
            run = []
        else:
            run.append(index)
    order += sorted(run, key=classes.__getitem__)
    return [letters[index] for index in order], [owners[index] for index in order]


def _loosely(text: str) -> str:
    """Without case and accents."""
    folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    return "".join(letter for letter in folded if not unicodedata.combining(letter))


# --------------------------------------------------------------------------------------------------------- the answer


def _gap(prompt: str, answer: str) -> str:
    """What stands between prompt and answer: a space, except where none is written."""
    end, begin = prompt[-1], answer[0]
    if _SPACELESS.match(end) and _SPACELESS.match(begin):
        return ""
    opening_quote = end in "\"'" and (len(prompt) == 1 or prompt[-2].isspace())
    return "" if opening_quote or unicodedata.category(end) in ("Ps", "Pi") else " "


def _tokenized_alone(tokenizer: Any, base: Sequence[int], words: str, continuation: str) -> tuple[int, ...]:
    """The answer's tokens apart from the prompt: the variant that spells it behind the prompt."""
    wanted = _decode(tokenizer, base) + continuation
    variants = [_encode(tokenizer, text, special=False)[0] for text in (continuation, words)]
    spelled = (ids for ids in variants if ids and _decode(tokenizer, [*base, *ids]) == wanted)
    return next(spelled, variants[0])
