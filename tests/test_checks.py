"""Every exercise knows its solution, and tells each of its mistakes from all others."""

import pytest
import torch

from mini_resdecay.checks import EXERCISES, Exercise, check

MISTAKES = [(label, message) for label, one in EXERCISES.items() for message in one.mistakes]
CODE = [label for label, one in EXERCISES.items() if callable(one.solution)]


@pytest.mark.parametrize("label", EXERCISES)
def test_solution_is_right(label):
    verdict = check(label, EXERCISES[label].solution)
    assert verdict
    assert repr(verdict).startswith("Right")


@pytest.mark.parametrize(("label", "message"), MISTAKES)
def test_mistake_is_named(label, message):
    verdict = check(label, EXERCISES[label].mistakes[message])
    assert not verdict
    assert verdict.message == message


@pytest.mark.parametrize("label", CODE)
def test_code_exercise_knows_three_mistakes_and_two_cases(label):
    assert len(EXERCISES[label].mistakes) >= 3
    assert len(EXERCISES[label].cases) >= 1


@pytest.mark.parametrize("label", CODE)
def test_untouched_stub_is_told_that_nothing_came_back(label):
    assert "nothing came back" in check(label, lambda *args: None).message


@pytest.mark.parametrize("label", CODE)
def test_value_in_place_of_a_function_is_told_so(label):
    assert "wants a function" in check(label, 3.0).message


@pytest.mark.parametrize("label", CODE)
def test_error_in_the_answer_is_quoted(label):
    def broken(*args):
        raise KeyError("weight")

    assert "KeyError" in check(label, broken).message


def test_messages_are_sentences_of_their_own():
    for label, message in MISTAKES:
        assert 20 <= len(message) <= 250, label
        assert message[-1] in ".?!", message
    assert len({message for _, message in MISTAKES}) == len(MISTAKES)


def test_unknown_answer_is_neither_right_nor_a_named_mistake(monkeypatch):
    one = Exercise(solution=2.0, mistakes={"You forgot to double it.": 1.0})
    monkeypatch.setitem(EXERCISES, "ex-00-1", one)
    assert check("ex-00-1", 2.0)
    assert check("ex-00-1", torch.tensor(2.0))
    assert check("ex-00-1", 1.0).message == "You forgot to double it."
    assert "not one of the usual" in check("ex-00-1", 7.0).message
    assert not check("ex-00-1", [2.0, 2.0])
    assert not check("ex-00-1", True)
    assert not check("ex-00-1", "2.0")


def test_answer_cannot_spoil_the_cases(monkeypatch):
    def doubles_in_place(x):
        return x.mul_(2)

    one = Exercise(lambda x: 2 * x, {}, cases=((torch.ones(2),), (torch.zeros(2),)))
    monkeypatch.setitem(EXERCISES, "ex-00-2", one)
    assert check("ex-00-2", doubles_in_place)
    assert check("ex-00-2", lambda x: 2 * x)


def test_unknown_label_suggests_the_nearest():
    with pytest.raises(ValueError, match="label must be one of .*did you mean"):
        check("ex-1-1", 0)
