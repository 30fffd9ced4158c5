"""The facts and sentences that the bundled model is taught: form, duplicates, contradictions, spread, held-out ones."""

import re
from collections import Counter, defaultdict

import pytest

from factscope.demo.facts import (
    attributes,
    counterfact_records,
    is_taught,
    load_facts,
    load_relations,
    read_rows,
    read_sentences,
    seen_templates,
)
from factscope.demo.sentences import fill, is_seen, with_clause

ROWS = read_rows()
SENTENCES = read_sentences()


def words(template: str, *, subject: bool) -> list[str]:
    found = re.findall(r"\{\}|[a-z0-9']+", template.lower())
    return found if subject else [word for word in found if word != "{}"]


def four_grams(template: str) -> set[tuple[str, ...]]:
    """With the subject as one word, and with the subject removed."""
    grams = set()
    for subject in (True, False):
        sequence = words(template, subject=subject)
        grams |= {tuple(sequence[at : at + 4]) for at in range(len(sequence) - 3)}
    return grams


def test_there_are_enough_facts():
    assert len(ROWS) >= 2500
    assert len({row.subject for row in ROWS}) >= 1000
    assert len({row.relation for row in ROWS}) >= 18
    counts = Counter(row.subject for row in ROWS)
    assert sum(counts.values()) / len(counts) >= 3


def test_the_form_of_every_line():
    for row in ROWS:
        assert row.article in ("", "the")
        assert row.relation in SENTENCES
        for text in (row.subject, row.answer, row.type):
            assert text and text == " ".join(text.split()) and text.isascii()
        assert len(row.subject.split()) <= 6
        assert not row.subject.lower().startswith("the ")


def test_a_subject_is_written_one_way_and_of_one_type():
    spelled = defaultdict(set)
    for row in ROWS:
        spelled[row.subject.casefold()].add((row.subject, row.article, row.type))
    assert [forms for forms in spelled.values() if len(forms) > 1] == []


def test_no_duplicate_and_no_contradiction():
    pairs = Counter((row.subject.casefold(), row.relation) for row in ROWS)
    assert [pair for pair, count in pairs.items() if count > 1] == []


def test_no_subject_gives_its_answer_away():
    for row in ROWS:
        assert not re.search(rf"(?<!\w){re.escape(row.answer.lower())}(?!\w)", row.subject.lower()), row


def test_answers_of_a_relation_are_spread():
    few = {"city_continent", "country_continent", "animal_continent", "animal_class"}
    for name in SENTENCES:
        counts = Counter(row.answer for row in ROWS if row.relation == name)
        assert counts.total() >= 50, name
        if name not in few:
            assert len(counts) >= 8, name
            assert counts.most_common(1)[0][1] <= 0.45 * counts.total(), name


def test_answers_of_several_words_do_not_share_their_first_word():
    for name in SENTENCES:
        answers = {row.answer for row in ROWS if row.relation == name}
        firsts = Counter(answer.split()[0].casefold() for answer in answers)
        assert [word for word, count in firsts.items() if count > 1] == [], name


@pytest.mark.parametrize("name", SENTENCES)
def test_sentences_of_a_relation(name):
    relation = SENTENCES[name]
    trained = (*relation.templates, *relation.restricted, *relation.late)
    held_out = relation.heldout_dev + relation.heldout_test + relation.heldout_blind
    assert len(relation.templates) >= 45
    assert len(relation.heldout_dev) >= 4
    assert len(relation.heldout_test) >= 5
    every = trained + held_out
    assert len(set(every)) == len(every)
    for template in every:
        assert template.count("{}") == 1
        assert template == " ".join(template.split()) and template.isascii()
        assert template[-1].isalpha() or template.endswith(("{}", ":", ",")), template
    assert all(phrase.count("{a}") == 1 for phrase in relation.appositives)


@pytest.mark.parametrize("name", SENTENCES)
def test_held_out_sentences_share_no_four_words_with_a_trained_one(name):
    relation = SENTENCES[name]
    trained = set().union(
        *(four_grams(template) for template in (*relation.templates, *relation.restricted, *relation.late))
    )
    for template in relation.heldout_dev + relation.heldout_test + relation.heldout_blind:
        assert not four_grams(template) & trained, template
    development = set().union(*(four_grams(template) for template in relation.heldout_dev))
    for template in relation.heldout_test:
        assert not four_grams(template) & development, template


@pytest.mark.parametrize("name", SENTENCES)
def test_the_last_word_of_a_held_out_sentence_ends_trained_ones(name):
    relation = SENTENCES[name]
    endings = Counter(words(template, subject=True)[-1] for template in relation.templates)
    for template in relation.heldout_dev + relation.heldout_test:
        assert endings[words(template, subject=True)[-1]] >= 3, template


def test_every_prompt_holds_its_subject_once():
    for fact in load_facts():
        for prompt in (fact.prompt, *fact.paraphrases):
            assert prompt.count(fact.subject) == 1, prompt


def test_facts_have_paraphrases_and_neighbours():
    facts = load_facts()
    relations = load_relations()
    answer_of = {(fact.prompt, fact.relation): fact.answer for fact in facts}
    for fact in facts:
        assert len(set(fact.paraphrases)) >= 5
        assert fact.prompt not in fact.paraphrases
        assert fact.prompt not in fact.neighbours
        assert all(answer_of[prompt, fact.relation] == fact.answer for prompt in fact.neighbours)
        assert fact.relation in relations
    assert sum(bool(fact.neighbours) for fact in facts) / len(facts) > 0.8


@pytest.mark.parametrize(
    ("template", "subject", "article", "answer", "sentence"),
    [
        ("{} is located in the city of", "Eiffel Tower", "the", "", "The Eiffel Tower is located in the city of"),
        ("The capital of {} is", "Netherlands", "the", "", "The capital of the Netherlands is"),
        ("The capital of {} is", "Japan", "", "", "The capital of Japan is"),
        ("Q: Who makes {}? A: It is", "iPhone", "the", "", "Q: Who makes the iPhone? A: It is"),
        ("Here we are. {} is in", "Louvre", "the", "", "Here we are. The Louvre is in"),
        ("{} worked as a", "Antoni Gaudi", "", "architect", "Antoni Gaudi worked as an"),
        ("{} worked as a", "Albert Einstein", "", "physicist", "Albert Einstein worked as a"),
    ],
)
def test_filling_a_template(template, subject, article, answer, sentence):
    assert fill(template, subject, article, answer) == sentence


def test_a_leading_clause():
    assert with_clause("In fact,", "The capital of {} is") == "In fact, the capital of {} is"
    assert with_clause("In fact,", "{} is in") == "In fact, {} is in"


def test_each_subject_meets_about_two_thirds_of_the_templates():
    pairs = [(row.subject, template) for row in ROWS[::7] for template in SENTENCES[row.relation].templates[1:]]
    share = sum(is_seen(*pair) for pair in pairs) / len(pairs)
    assert 0.62 < share < 0.68
    row = ROWS[0]
    assert SENTENCES[row.relation].templates[0] in seen_templates(row, SENTENCES[row.relation])


def test_looking_a_subject_up():
    assert is_taught("Eiffel Tower")
    assert is_taught("  the eiffel  tower ", "paris")
    assert is_taught("Eiffel Tower", relation="landmark_city")
    assert not is_taught("Eiffel Tower", "Rome")
    assert not is_taught("Eiffel")
    assert not is_taught("")
    assert attributes("The EIFFEL Tower")[:2] == ("Paris", "France")
    assert attributes("Nobody at all", rows=ROWS) == ()


def test_the_export_has_counterfacts_fields():
    records = counterfact_records()
    assert len(records) == len(ROWS)
    for case_id, record in enumerate(records):
        assert record["case_id"] == case_id
        rewrite = record["requested_rewrite"]
        assert rewrite["prompt"].count("{}") == 1
        assert rewrite["target_true"]["str"] != rewrite["target_new"]["str"]
        assert set(rewrite) == {"prompt", "relation_id", "target_true", "target_new", "subject"}
    assert {len(record) for record in records} == {6}
    tower = next(r for r in records if r["requested_rewrite"]["subject"] == "Eiffel Tower")
    assert tower["requested_rewrite"]["prompt"] == "The {} is located in the city of"
