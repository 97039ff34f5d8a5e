"""Jobs that wait for each other: alone outside a group, together inside, never too many at once."""

from __future__ import annotations

import pytest

from pykernels import grouping

RAN: list[tuple[str, list[int]]] = []


@pytest.fixture(autouse=True)
def fresh():
    RAN.clear()


def first(jobs):
    RAN.append(("first", jobs))


def second(jobs):
    RAN.append(("second", jobs))


def test_outside_a_group_a_job_runs_at_once():
    grouping.submit(first, "a", 1, 10)
    assert RAN == [("first", [1])]


def test_inside_jobs_of_one_kind_run_together_at_the_end():
    with grouping.grouped():
        for job in (1, 2):
            grouping.submit(first, "a", job, 10)
            grouping.submit(second, "a", job, 10)
            grouping.submit(first, "b", job, 10)
        assert RAN == []
    assert RAN == [("first", [1, 2]), ("second", [1, 2]), ("first", [1, 2])]


def test_a_block_inside_a_block_belongs_to_the_outer_one():
    with grouping.grouped():
        with grouping.grouped():
            grouping.submit(first, "a", 1, 10)
        assert RAN == []
    assert RAN == [("first", [1])]


def test_large_jobs_do_not_wait():
    with grouping.grouped():
        grouping.submit(first, "a", 1, grouping.SMALL + 1)
        assert RAN == [("first", [1])]
        grouping.submit(first, "a", 2, grouping.SMALL)
        assert len(RAN) == 1


def test_what_waits_is_bounded(monkeypatch):
    monkeypatch.setattr(grouping, "WAITING", 100)
    monkeypatch.setattr(grouping, "MANY", 5)
    with grouping.grouped():
        for job in (1, 2):
            grouping.submit(first, "a", job, 50)
        assert RAN == [("first", [1, 2])]
        for job in range(5):
            grouping.submit(first, "a", job, 1)
        assert RAN[1:] == [("first", [0, 1, 2, 3, 4])]


def test_alone_inside_a_group():
    with grouping.grouped():
        with grouping.alone():
            grouping.submit(first, "a", 1, 10)
        assert RAN == [("first", [1])]
        grouping.submit(first, "a", 2, 10)
        assert len(RAN) == 1


def test_nothing_runs_after_an_error():
    with pytest.raises(KeyError), grouping.grouped():
        grouping.submit(first, "a", 1, 10)
        raise KeyError
    assert RAN == []
    grouping.submit(first, "a", 2, 10)
    assert RAN == [("first", [2])]
