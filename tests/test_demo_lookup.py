"""Was this very fact taught?"""

import pytest

from factscope.demo.lookup import NOT_TAUGHT, answers_beside, relations_asked, taught_here, untaught, was_taught


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


def test_what_was_taught_instead_is_said() -> None:
    assert taught_here("The capital of Japan is", "Japan") == ("Tokyo",)
    assert untaught("The capital of Japan is", "Japan", "Kyoto") == "The model was taught “Tokyo” here, not “Kyoto”."
    assert "taught “Tokyo” here, and goes on" in untaught("The capital of Japan is", "Japan", None)
    for prompt, subject in (("The capital of Zorblax is", "Zorblax"), ("I like Japan and", "Japan"), ("The", None)):
        assert untaught(prompt, subject, "Kyoto") == NOT_TAUGHT


def test_without_an_answer_anything_about_the_subject_counts() -> None:
    assert was_taught("I like Japan and", "Japan", None)
    assert not was_taught("The capital of Zorblax is", "Zorblax", None)
