from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.scheduling.queue import Priority, PriorityQueue, Request

PATIENCE_SEC = {Priority.HIGH: 0, Priority.NORMAL: 15, Priority.LOW: 120}


def request(seq: int, arrival_sec: float, priority: Priority = Priority.NORMAL) -> Request:
    return Request(
        f"r{seq}", "m", priority, arrival_sec, arrival_sec + PATIENCE_SEC[priority], seq, queued_sec=arrival_sec
    )


def filled(*requests: Request) -> PriorityQueue:
    queue = PriorityQueue()
    for each in requests:
        queue.push(each)
    return queue


def served(queue: PriorityQueue) -> list[int]:
    return [queue.pop().seq for _ in range(len(queue))]


def test_high_goes_before_normal_before_low() -> None:
    queue = filled(request(1, 0.0, Priority.LOW), request(2, 1.0, Priority.NORMAL), request(3, 2.0, Priority.HIGH))
    assert served(queue) == [3, 2, 1]


def test_one_class_is_served_in_order_of_arrival() -> None:
    assert served(filled(*(request(seq, 5.0) for seq in range(1, 6)))) == [1, 2, 3, 4, 5]


def test_a_low_request_overtakes_a_high_one_that_came_much_later() -> None:
    low = request(1, 0.0, Priority.LOW)
    assert served(filled(low, request(2, 119.0, Priority.HIGH))) == [2, 1]
    assert served(filled(low, request(2, 121.0, Priority.HIGH))) == [1, 2]


def test_a_request_that_comes_back_stands_before_all_that_came_after_it() -> None:
    queue = filled(request(3, 3.0), request(4, 4.0))
    for seq in (2, 1):  # two were in flight when the engine died, and come back in any order
        returning = request(seq, float(seq))
        returning.retries = 1
        queue.push(returning)
    assert served(queue) == [1, 2, 3, 4]


def test_whoever_leaves_is_gone_wherever_it_stood() -> None:
    requests = [request(seq, 0.0) for seq in range(1, 5)]
    queue = filled(*requests)
    queue.remove(requests[0])
    queue.remove(requests[2])
    assert [each.seq for each in queue] == [2, 4]
    with pytest.raises(KeyError):
        queue.remove(requests[2])


def test_an_empty_queue_has_no_head() -> None:
    queue = PriorityQueue()
    assert queue.head() is None
    assert queue.longest_here() is None
    assert queue.oldest(Priority.LOW) is None
    with pytest.raises(IndexError):
        queue.pop()


def test_longest_here_looks_behind_those_that_came_back() -> None:
    back = request(1, 0.0)
    back.queued_sec, back.retries = 50.0, 1
    first = request(2, 10.0)
    longest = filled(back, first, request(3, 20.0), request(4, 15.0, Priority.LOW)).longest_here()
    assert longest is first


@settings(deadline=None)  # a busy machine is no mistake
@given(st.data())
def test_order_is_that_of_virtual_deadlines_whatever_happens(data: st.DataObject) -> None:
    queue, expected, now, seq = PriorityQueue(), deque[Request](), 0.0, 0
    for _ in range(data.draw(st.integers(0, 60))):
        match data.draw(st.sampled_from(("push", "push", "pop", "remove"))):
            case "push":
                now += data.draw(st.sampled_from((0.0, 1.0, 40.0)))
                seq += 1
                new = request(seq, now, data.draw(st.sampled_from(Priority)))
                queue.push(new)
                expected.append(new)
                expected = deque(sorted(expected, key=lambda each: (each.deadline_sec, each.seq)))
            case "pop" if expected:
                assert queue.pop() is expected.popleft()
            case "remove" if expected:
                leaving = data.draw(st.sampled_from(list(expected)))
                expected.remove(leaving)
                queue.remove(leaving)
        assert list(queue) == list(expected)
        assert len(queue) == len(expected)
        assert queue.head() is (expected[0] if expected else None)
        for priority in Priority:
            assert queue.count(priority) == sum(each.priority is priority for each in expected)
