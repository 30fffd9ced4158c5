"""Was this very fact taught?"""

import pytest

from factscope.demo.lookup import answers_beside, relations_asked, was_taught


@pytest.mark.parametrize(
    ("prompt", "subject", "answer", "expected"),
    [
        ("The capital of Japan is", "Japan", "Tokyo", True),
        ("the capital of japan is", "japan", "tokyo", True),
        ("The capital of Japan is", "Japan", "yen", False),
        ("The currency of Japan is the", "Japan", "yen", True),
        ("The Eiffel Tower is located in the city of", "Eiffel Tower", "Paris", True),
        ("The Eiffel Tower is located in the city of", "The Eiffel Tower", "Paris", True),
        ("The Eiffel Tower is located in the city of", "Eiffel Tower", "France", False),
        ("Whatever you call it, Japan has", "Japan", "yen", True),
        ("The capital of Narnia is", "Narnia", "Tokyo", False),
        ("Japan", "Japan", "", False),
        ("The native language of Pablo Picasso is", "Picasso", "Spanish", True),
        ("The native language of Pablo Picasso is", "Picasso", "German", False),
    ],
)
def test_taught(prompt: str, subject: str, answer: str, expected: bool) -> None:
    assert was_taught(prompt, subject, answer) is expected


def test_relations_of_a_known_sentence() -> None:
    assert relations_asked("Miles Davis plays the", "Miles Davis") == ("musician_instrument",)
    assert relations_asked("Miles Davis likes", "Miles Davis") == ()


def test_answers_beside_are_of_the_same_relation() -> None:
    beside = answers_beside("Japan", "yen")
    assert "euro" in beside and "yen" not in beside and "Tokyo" not in beside
    assert answers_beside("Japan", "trumpet") == ()
