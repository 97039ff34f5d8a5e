"""Jobs that wait for each other: alone outside a group, together inside, never too many at once."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from pykernels import grouping

RAN: list[tuple[str, list[int]]] = []


@pytest.fixture(autouse=True)
def fresh():
    RAN.clear()


def submit(run, key, job, elements):
    """On host memory."""
    grouping.submit(run, key, job, elements, torch.device("cpu"))


def first(jobs):
    RAN.append(("first", jobs))


def second(jobs):
    RAN.append(("second", jobs))


def test_outside_a_group_a_job_runs_at_once():
    submit(first, "a", 1, 10)
    assert RAN == [("first", [1])]


def test_inside_jobs_of_one_kind_run_together_at_the_end():
    with grouping.grouped():
        for job in (1, 2):
            submit(first, "a", job, 10)
            submit(second, "a", job, 10)
            submit(first, "b", job, 10)
        assert RAN == []
    assert RAN == [("first", [1, 2]), ("second", [1, 2]), ("first", [1, 2])]


def test_a_block_inside_a_block_belongs_to_the_outer_one():
    with grouping.grouped():
        with grouping.grouped():
            submit(first, "a", 1, 10)
        assert RAN == []
    assert RAN == [("first", [1])]


def test_large_jobs_do_not_wait():
    with grouping.grouped():
        submit(first, "a", 1, grouping.SMALL + 1)
        assert RAN == [("first", [1])]
        submit(first, "a", 2, grouping.SMALL)
        assert len(RAN) == 1


def test_what_waits_is_bounded(monkeypatch):
    monkeypatch.setattr(grouping, "WAITING", 100)
    monkeypatch.setattr(grouping, "MANY", 5)
    with grouping.grouped():
        for job in (1, 2):
            submit(first, "a", job, 50)
        assert RAN == [("first", [1, 2])]
        for job in range(5):
            submit(first, "a", job, 1)
        assert RAN[1:] == [("first", [0, 1, 2, 3, 4])]


def test_alone_inside_a_group():
    with grouping.grouped():
        with grouping.alone():
            submit(first, "a", 1, 10)
        assert RAN == [("first", [1])]
        submit(first, "a", 2, 10)
        assert len(RAN) == 1


def test_nothing_runs_after_an_error():
    with pytest.raises(KeyError), grouping.grouped():
        submit(first, "a", 1, 10)
        raise KeyError
    assert RAN == []
    submit(first, "a", 2, 10)
    assert RAN == [("first", [2])]


def test_jobs_wait_for_the_stream_of_their_own_device(monkeypatch):
    """Not for that of whichever device is current; each kind of stream runs on its own."""
    on, streams = [], {0: "zero", 1: "one"}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[device.index])
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(on.append(stream)))
    with grouping.grouped():
        for job, index in enumerate((1, 0, 1)):
            grouping.submit(first, "a", job, 10, torch.device("cuda", index))
        streams[1] = "another"
        grouping.submit(first, "a", 3, 10, torch.device("cuda", 1))
    assert on == ["one", "zero", "another"]
    assert RAN == [("first", [0, 2]), ("first", [1]), ("first", [3])]
