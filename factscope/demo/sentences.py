"""Templates to sentences: where the subject goes, its article, and "a" or "an" before the answer.

Only text, standard library only: the facts, the training corpus and the measurements all fill templates here, so that
they cannot disagree about what a sentence is.
"""

from __future__ import annotations

from zlib import crc32

SEEN_PERCENT = 65
_BEFORE_A_SENTENCE = (". ", "? ", "! ", "A: ", "Q: ", "Answer: ", "Question: ")


def fill(template: str, subject: str, article: str = "", answer: str = "") -> str:
    """Puts a subject into a template.

    Args:
        template: a sentence with one ``{}`` that ends right before the answer.
        subject: the name, without its article.
        article: "the" where a sentence says it before the subject, else empty.
        answer: if given, a final "a" becomes "an" where the answer starts with a vowel.

    Returns:
        The sentence up to the answer. It contains the subject as it was given.
    """
    before, after = template.split("{}")
    if article:
        starts = not before or before.endswith(_BEFORE_A_SENTENCE)
        before = f"{before}{article.capitalize() if starts else article} "
    sentence = f"{before}{subject}{after}"
    if answer and sentence.endswith(" a") and answer[0].lower() in "aeiou":
        sentence += "n"
    return sentence


def is_question(template: str) -> bool:
    """Whether a template is a question with the start of its answer; such a template takes no leading clause."""
    return "?" in template or template.startswith(("Q:", "Question:"))


def with_clause(clause: str, template: str) -> str:
    """Puts a leading clause before a statement: "In fact," and "The capital of {} is"."""
    if not template.startswith(("{}", "I ")):
        return f"{clause} {template[0].lower()}{template[1:]}"
    return f"{clause} {template}"


def is_seen(subject: str, template: str) -> bool:
    """Whether a subject meets a template in training: 65 of 100 pairs do, chosen by a hash."""
    return crc32(f"{subject}|{template}".encode()) % 100 < SEEN_PERCENT


def is_seen_clause(clause: str, template: str) -> bool:
    """Whether a leading clause meets a template in training: three of four pairs do, chosen by a hash."""
    return crc32(f"{clause}||{template}".encode()) % 4 != 0


def is_dev(subject: str) -> bool:
    """Whether a subject is for choosing recipes and checkpoints (half of them); the others are for the final figures."""
    return crc32(f"half|{subject}".encode()) % 2 == 0
