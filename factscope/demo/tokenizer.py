"""The bundled model's tokenizer: byte-level BPE in which answers are one token and names are several.

Names must be several tokens: with names of two whole-word tokens a small model recalls everything in its first layer,
and nothing that FactScope shows is there to be seen. So names have no weight here: merges are learned from the
sentences alone, then each answer's own merges are appended until the answer is one token. Later merges rank lower, so
they do not change how anything else that came before is split.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from factscope.demo.corpus import CLAUSES, ENDINGS_OF_TEXT, FILLERS, INSERTS
from factscope.demo.facts import RelationSentences, TaughtFact

END = "<|endoftext|>"
CONTEXT = 128


def build_tokenizer(
    rows: Sequence[TaughtFact], sentences: dict[str, RelationSentences], *, min_frequency: int = 3
) -> PreTrainedTokenizerFast:
    """Learns the merges.

    Args:
        min_frequency: how often a pair must occur in the sentences to be merged; a larger number splits names more.

    Returns:
        A fast tokenizer that puts the end token first by itself, with offsets that exclude the leading space.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=20_000,
        min_frequency=min_frequency,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sentence_text(sentences), trainer)
    state = json.loads(tokenizer.to_str())
    answers = Counter(row.answer for row in rows)
    _append_merges(state["model"], tokenizer, [answer for answer, _ in answers.most_common()])
    tokenizer = Tokenizer.from_str(json.dumps(state))
    end = tokenizer.token_to_id(END)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single=f"{END} $A", pair=f"{END} $A $B", special_tokens=[(END, end)]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the files that ``AutoTokenizer.from_pretrained`` reads, under the class name that older versions know."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _sentence_text(sentences: dict[str, RelationSentences]) -> list[str]:
    """Every trained sentence once, without a subject, and the words that all relations share."""
    text = []
    for relation in sentences.values():
        text += [template.replace("{}", "") for template in (*relation.templates, *relation.restricted)]
        text += [phrase.replace("{a}", "") for phrase in relation.appositives]
        text += [relation.kind] * 3
    return text + [*CLAUSES, *FILLERS, *INSERTS, *ENDINGS_OF_TEXT] * 3


def _append_merges(model: dict, tokenizer: Tokenizer, answers: Sequence[str]) -> None:
    """Adds merges to a BPE model's state, in place, until each answer's words are one token each."""
    merges = [tuple(pair) for pair in model["merges"]]
    rank = {pair: index for index, pair in enumerate(merges)}
    vocabulary = model["vocab"]
    for answer in answers:
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(answer):
            pieces = _apply(list(word), rank)
            while len(pieces) > 1:
                pair = (pieces[0], pieces[1])
                rank[pair] = len(merges)
                merges.append(pair)
                vocabulary.setdefault("".join(pair), len(vocabulary))
                pieces = _apply(list(word), rank)
    model["merges"] = [list(pair) for pair in merges]


def _apply(pieces: list[str], rank: dict[tuple[str, str], int]) -> list[str]:
    while len(pieces) > 1:
        pairs = [(rank.get(pair, len(rank)), index) for index, pair in enumerate(pairwise(pieces))]
        best, at = min(pairs)
        if best == len(rank):
            break
        pieces = [*pieces[:at], pieces[at] + pieces[at + 1], *pieces[at + 2 :]]
    return pieces
