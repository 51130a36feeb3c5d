"""Searches: what they ask depends on what they were told alone."""

import math
import random

import pytest

from gradreg.lab.search import Climb, Grid, Range, beside, propose, replayed, rounded, shrinking


def height(point):
    """One hill, at a = 3, b = 0.2."""
    return -(math.log(point["a"] / 3) ** 2) - 2 * math.log(point["b"] / 0.2) ** 2


def climbed(search, score=height):
    rounds = []
    while asked := search.ask():
        rounds.append(asked)
        for point in asked:
            search.tell(point, [score(point)])
    return rounds


def climb(most=40):
    return Climb([{"a": 0.1, "b": 1.0}, {"a": 0.3, "b": 1.0}], most)


def test_a_climb_finds_the_top_and_tries_nothing_twice():
    search = climb(60)
    rounds = climbed(search)
    points = [tuple(point.items()) for asked in rounds for point in asked]
    assert len(points) == len(set(points)) == len(search) <= 60
    assert search.best["a"] == pytest.approx(3, rel=0.1)
    assert search.best["b"] == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize("most", [1, 2, 5, 17])
def test_a_climb_asks_no_more_than_it_may(most):
    search = climb(most)
    climbed(search)
    assert len(search) == most


def test_the_step_shrinks_where_all_neighbors_are_behind():
    assert [round(step, 3) for step, _ in shrinking(2.0)] == [2.0, 1.414, 1.189, 1.091]
    search = Climb([{"a": 3.0, "b": 0.2}])
    rounds = climbed(search)
    assert rounds[1] == beside({"a": 3.0, "b": 0.2}, 2.0)
    assert rounds[2] == beside({"a": 3.0, "b": 0.2}, 2**0.5)


def test_rounds_may_be_counted():
    search = Climb([{"a": 0.001, "b": 0.2}], steps=[(3.0, 2), (1.5, 1)])
    assert len(climbed(search)) == 4  # the start, two rounds of the large step, one of the small one


def test_neighbors_change_one_number_and_leave_words_and_zeros():
    found = beside({"a": 1.0, "zero": 0.0, "word": "x", "count": 3}, 2.0)
    assert found == [
        {"a": 0.5, "zero": 0.0, "word": "x", "count": 3},
        {"a": 2.0, "zero": 0.0, "word": "x", "count": 3},
    ]


@pytest.mark.parametrize("seed", range(5))
def test_a_search_is_gone_on_with_from_any_moment(seed):
    whole = [point for asked in climbed(climb()) for point in asked]
    told = [(point, [height(point)]) for point in whole]
    at = random.Random(seed).randrange(len(told))
    asked = replayed(climb(), told[:at])
    assert asked == whole[at : at + len(asked)]
    assert asked  # before the end there is something to ask
    assert replayed(climb(), told) == []


def test_an_answer_that_is_out_is_waited_for():
    first = climb().ask()
    assert replayed(climb(), [(first[0], [1.0]), (first[1], None)]) == []
    assert replayed(climb(), [(first[0], None)]) == [first[1]]


def test_a_point_that_failed_is_worse_than_any():
    search = Grid([{"a": 1.0}, {"a": 2.0}])
    for point, score in zip(search.ask(), ([-math.inf], [-1e9])):
        search.tell(point, score)
    assert search.best == {"a": 2.0}
    assert search.ask() == []


def test_the_choice_is_among_those_that_were_tried_most():
    search = Grid([{"a": 1.0}, {"a": 2.0}, {"a": 3.0}])
    for point, score in zip(search.ask(), (5.0, 4.0, 3.0)):
        search.tell(point, [score])
    assert search.finalists(2) == [{"a": 1.0}, {"a": 2.0}]
    search.tell({"a": 1.0}, [0.0])
    search.tell({"a": 2.0}, [4.0])
    assert search.choice() == {"a": 2.0}
    assert search.best == {"a": 2.0}


def test_a_proposal_has_three_digits_and_keeps_to_its_range():
    axes = {"gamma": Range(1e-3, 1.0, "log"), "ascent": ("gradient", "normalized")}
    for seed in range(20):
        point = propose(axes, [], seed)
        assert 1e-3 <= point["gamma"] <= 1.0
        assert point["gamma"] == rounded(point["gamma"])
        assert point["ascent"] in axes["ascent"]
