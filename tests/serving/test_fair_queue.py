"""The order in which requests begin."""

import pytest

from qwen_image_fast.serving.fair_queue import FairQueue


def order(queue):
    found = []
    while (item := queue.pop()) is not None:
        found.append(item)
    return found


def filled(*entries):
    queue = FairQueue()
    for item, now, seconds, priority, tenant in entries:
        queue.push(item, now=now, seconds=seconds, cost=seconds, priority=priority, tenant=tenant)
    return queue


@pytest.mark.parametrize("entries, expected", [
    # short ones overtake long ones, but none that has waited as long as it takes
    ([("long", 0, 10, 0, ""), ("short", 1, 1, 0, ""), ("late", 20, 1, 0, "")], ["short", "long", "late"]),
    # a tenant with many requests does not hold up one with few
    ([("a1", 0, 1, 0, "a"), ("a2", 0, 1, 0, "a"), ("b1", 5, 1, 0, "b")], ["a1", "b1", "a2"]),
    # a priority above another has twice its share
    ([(f"{p}{k}", 0, 1, p, "") for k in range(3) for p in (0, 1)], ["10", "00", "11", "12", "01", "02"]),
])  # fmt: skip
def test_order(entries, expected):
    assert order(filled(*entries)) == expected


def test_a_pause_gives_no_credit():
    queue = filled(*[(f"a{k}", 0, 1, 0, "a") for k in range(4)])
    assert [queue.pop(), queue.pop()] == ["a0", "a1"]
    for k in range(3):
        queue.push(f"b{k}", now=0, seconds=1, cost=1, tenant="b")
    assert sorted(order(queue)[:3]) != ["b0", "b1", "b2"]
    assert len(queue) == 0


def test_what_does_not_fit_waits_and_what_is_unwanted_goes():
    queue = filled(("large", 0, 1, 0, ""), ("small", 1, 5, 0, ""))
    assert queue.pop(lambda item: item != "large") == "small"
    assert queue.pop(lambda item: False) is None and len(queue) == 1 and list(queue) == ["large"]
    assert queue.remove(lambda item: True) == ["large"] and len(queue) == 0
