"""How a cluster's races are spread, without any cluster."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convdispatch import machine
from convdispatch.problem import Problem
from convdispatch.tuning.spread import MOST_TRIES, Job, Kind, Spread, Worker
from convdispatch.tuning.workload import Layer

ONE, TWO = (Kind(replace(machine.current(), cpu=cpu), 2) for cpu in ("One (one)", "Two (two)"))
SMALL = Problem.parse("1x9x9x4 * 3x3x4x8 SAME")


def jobs(*kinds: Kind) -> list[Job]:
    return [Job(kind, Layer(SMALL.replace(n=n)), "plan") for n, kind in enumerate(kinds, 1)]


def worker(address: str, host: str, kind: Kind = ONE) -> Worker:
    return Worker(address, host, host, kind)


def spread_of(waiting: list[Job], *workers: Worker) -> Spread:
    spread = Spread(waiting)
    for one in workers:
        spread.join(one)
    return spread


def all_that_begin(spread: Spread) -> list[tuple[Job, Worker]]:
    return list(iter(spread.begin, None))


def test_each_host_gets_one_job_in_their_order() -> None:
    waiting = jobs(ONE, ONE, ONE)
    a1, a2, b1 = worker("a1", "a"), worker("a2", "a"), worker("b1", "b")
    spread = spread_of(waiting, a1, a2, b1)
    assert all_that_begin(spread) == [(waiting[0], a1), (waiting[1], b1)]
    spread.end(b1)
    assert all_that_begin(spread) == [(waiting[2], b1)]
    assert spread.waiting == ()


def test_kinds_on_one_host_share_it_and_the_longer_queue_comes_first() -> None:
    waiting = jobs(ONE, TWO, TWO)
    a1, a2 = worker("a1", "a", ONE), worker("a2", "a", TWO)
    spread = spread_of(waiting, a1, a2)
    order = []
    while (pair := spread.begin()) is not None:
        assert spread.begin() is None
        order.append(pair)
        spread.end(pair[1])
    assert order == [(waiting[1], a2), (waiting[0], a1), (waiting[2], a2)]


def test_a_lost_job_waits_for_another_host_and_comes_before_the_others() -> None:
    waiting = jobs(ONE, ONE, ONE)
    a1, a2, b1 = worker("a1", "a"), worker("a2", "a"), worker("b1", "b")
    spread = spread_of(waiting, a1, a2, b1)
    all_that_begin(spread)
    assert spread.leave("a1") is None
    assert spread.begin() == (waiting[2], a2)
    assert spread.begin() is None
    spread.end(a2)
    spread.end(b1)
    assert all_that_begin(spread) == [(waiting[0], b1)]
    assert spread.leave("b1") is waiting[0]
    assert waiting[0].lost == [a1, b1]
    assert spread.waiting == ()


def test_a_lost_job_goes_to_its_own_host_where_there_is_no_other() -> None:
    waiting = jobs(ONE)
    spread = spread_of(waiting, worker("a1", "a"))
    all_that_begin(spread)
    spread.leave("a1")
    assert spread.stranded() == waiting
    assert spread.begin() is None
    spread.join(worker("a2", "a"))
    assert spread.stranded() == []
    assert spread.begin() == (waiting[0], worker("a2", "a"))


def test_who_leaves_without_a_job_takes_none_away() -> None:
    waiting = jobs(ONE)
    a1, a2 = worker("a1", "a"), worker("a2", "a")
    spread = spread_of(waiting, a1, a2)
    all_that_begin(spread)
    assert spread.leave("a2") is None
    assert spread.running == ((waiting[0], a1),)


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ([("a", ONE)], 1 / 3),
        ([("a", ONE), ("b", ONE)], 2 / 3),
        ([("a", ONE), ("b", ONE), ("c", ONE), ("d", ONE)], 1.0),
        ([("a", ONE), ("a", TWO)], 1 / 6),
        ([("a", ONE), ("a", ONE)], 1 / 3),
    ],
)
def test_a_job_gets_its_part_of_the_time(hosts: list[tuple[str, Kind]], expected: float) -> None:
    waiting = jobs(ONE, ONE, ONE, TWO, TWO, TWO, TWO)
    workers = [worker(f"{number}", host, kind) for number, (host, kind) in enumerate(hosts)]
    spread = spread_of(waiting, *workers)
    spread.drop(waiting[0])
    assert spread.share(waiting[0]) == pytest.approx(expected)


EVENTS = st.tuples(st.sampled_from(["join", "join", "leave", "end", "end"]), st.integers(0, 5))


@given(st.lists(st.sampled_from([ONE, TWO]), min_size=1, max_size=8), st.lists(EVENTS, max_size=40))
def test_whatever_happens_a_host_races_one_and_every_job_ends_once(
    kinds: list[Kind], events: list[tuple[str, int]]
) -> None:
    waiting = jobs(*kinds)
    spread = Spread(waiting)
    ended: list[Job] = []
    for number, (event, which) in enumerate(events):
        if event == "join":
            spread.join(worker(str(number), "abc"[which % 3], (ONE, TWO)[which // 3]))
        elif event == "leave" and spread.workers:
            given_up = spread.leave(spread.workers[which % len(spread.workers)].address)
            if given_up is not None:
                assert len(given_up.lost) == MOST_TRIES
                ended.append(given_up)
        elif event == "end" and spread.running:
            job, runner = spread.running[which % len(spread.running)]
            spread.end(runner)
            ended.append(job)
        for job, runner in all_that_begin(spread):
            assert job.kind == runner.kind
            assert runner in spread.workers
        hosts = [runner.host for _, runner in spread.running]
        assert len(hosts) == len(set(hosts))
        idle = {one.kind for one in spread.workers if one.host not in hosts}
        assert not [job for job in spread.waiting if job.kind in idle and not job.lost]
        there = [*spread.waiting, *(job for job, _ in spread.running), *ended]
        assert sorted(map(id, there)) == sorted(map(id, waiting))
