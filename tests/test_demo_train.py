"""The training program: it resumes to the same weights, and its schedules are what the card says."""

import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from factscope.demo import train as training
from factscope.demo.train import STRETCH, Recipe, learning_rate, train, word_weight

TINY = Recipe(seed=7, layers=1, width=16, heads=2, steps=STRETCH, last_steps=STRETCH, batch=1)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_run_that_was_cut_off_ends_at_the_same_weights(tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(TINY, whole, resume=False, device="cpu", half=False)
    run_stretch = training._run_stretch

    def interrupted(*arguments):
        if arguments[4] == 1:
            raise KeyboardInterrupt
        return run_stretch(*arguments)

    monkeypatch.setattr(training, "_run_stretch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(TINY, cut, resume=False, device="cpu", half=False)
    monkeypatch.setattr(training, "_run_stretch", run_stretch)
    assert not (cut / "model").exists()
    train(TINY, cut, resume=True, device="cpu", half=False)
    first, second = (GPT2LMHeadModel.from_pretrained(folder / "model").state_dict() for folder in (whole, cut))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert AutoTokenizer.from_pretrained(cut / "model")("Paris is")["input_ids"][0] == 0


def test_the_schedules():
    recipe = Recipe()
    assert learning_rate(recipe, 0) == pytest.approx(recipe.learning_rate / recipe.warmup)
    assert learning_rate(recipe, recipe.warmup) == pytest.approx(recipe.learning_rate)
    assert learning_rate(recipe, recipe.steps - 1) == pytest.approx(recipe.final * recipe.learning_rate, rel=0.01)
    assert learning_rate(recipe, recipe.steps) == pytest.approx(recipe.last_learning_rate)
    assert word_weight(recipe, 0) == word_weight(recipe, recipe.steps // 2) == 0.3
    assert word_weight(recipe, recipe.steps - 1) == pytest.approx(0.01)
    assert word_weight(recipe, recipe.steps) == 0.002
