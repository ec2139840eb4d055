"""Times to think, and what waits for what, in made threads whose order is known."""

from typing import Any

from dlrm.replay.order import (
    BARRIER,
    BEGIN,
    CALL,
    END,
    JOIN,
    LIMIT,
    PUT,
    START,
    TAKE,
    Node,
    Timed,
    order_threads,
    take_out_waits,
)
from dlrm.replay.plan import TracedSpan

MAIN, READER = (1, 1), (1, 2)


def span(cat: str, name: str, **args: int) -> TracedSpan:
    return TracedSpan(cat, name, None, False, args)


def order(**threads: list[tuple[int, int, Any]]) -> dict[str, list[Node]]:
    """(begin, duration, span or name of a call) of each thread -> its nodes. Threads: main, reader."""
    names = {"main": MAIN, "reader": READER}
    items: dict[tuple[int, int], list[Timed]] = {
        names[thread]: sorted(
            [(begin, -lasts, BEGIN if isinstance(what, TracedSpan) else CALL, what)
             for begin, lasts, what in own],
            key=lambda each: each[:3],
        )
        for thread, own in threads.items()
    }  # fmt: skip
    spans = {
        names[thread]: [(begin, lasts, what) for begin, lasts, what in own if isinstance(what, TracedSpan)]
        for thread, own in threads.items()
    }
    found = order_threads(items, MAIN, spans)
    return {thread: found[names[thread]] for thread in threads}


def times(nodes: list[Node]) -> list[tuple[int, int]]:
    return [(node.think, node.kind) for node in nodes]


def test_thinking_begins_where_the_last_call_ended() -> None:
    """Not where it began: 100 us of a call that took 30 are 70 to think."""
    nodes = order(main=[(1000, 30, "a"), (1100, 5, "b"), (1105, 5, "c")])["main"]
    assert times(nodes) == [(0, CALL), (70, CALL), (0, CALL)]


def test_spans_are_around_what_is_inside() -> None:
    outer, inner = span("train", "epoch"), span("torchrec", "forward")
    nodes = order(main=[(0, 100, outer), (10, 50, inner), (20, 5, "a"), (90, 30, "b")])["main"]
    kinds = [(kind, payload) for _, kind, payload in nodes]
    assert kinds == [
        (BEGIN, outer), (BEGIN, inner), (CALL, "a"), (END, inner), (CALL, "b"), (END, outer),
    ]  # fmt: skip
    assert [node.think for node in nodes] == [0, 10, 10, 35, 30, 0]


def test_a_thread_begins_after_what_main_had_done() -> None:
    """It began at 150, while the call of 130 to 180 went on: after the call that ended at 110."""
    nodes = order(main=[(100, 10, "a"), (130, 50, "b"), (300, 5, "c")], reader=[(150, 5, "r"), (160, 5, "s")])
    assert times(nodes["main"]) == [(0, CALL), (20, START), (0, CALL), (120, CALL)]
    assert times(nodes["reader"]) == [(20, CALL), (5, CALL)]


def test_threads_that_had_ended_are_waited_for() -> None:
    """A save waits for the one before, and so does main where it waited for a checkpoint; it thinks no longer
    for that.
    """
    items: dict[tuple[int, int], list[Timed]] = {
        MAIN: [(0, -5, CALL, "a"), (300, -200, BEGIN, span("checkpoint", "wait")), (600, -5, CALL, "b")],
        (1, 2): [(100, -5, CALL, "write"), (400, -5, CALL, "rename")],
        (1, 3): [(550, -5, CALL, "write")],
    }
    found = order_threads(items, MAIN, {})
    assert [(node.kind, node.think) for node in found[MAIN]] == [
        (CALL, 0), (START, 95), (BEGIN, 200), (JOIN, 0), (END, 0), (START, 50), (CALL, 50),
    ]  # fmt: skip
    assert [(node.kind, node.think) for node in found[1, 3]] == [(JOIN, 0), (CALL, 0)]


def test_a_wait_ends_with_the_batch() -> None:
    """Of the 500 us that main waited none are time to think."""
    nodes = order(
        main=[(0, 500, span("data", "wait", batch=7)), (520, 5, "step")],
        reader=[(0, 490, span("data", "read", batch=7)), (10, 460, "read")],
    )
    assert times(nodes["main"]) == [(0, START), (0, BEGIN), (0, TAKE), (0, END), (20, CALL)]
    assert nodes["main"][2].payload == (READER, 1)
    assert times(nodes["reader"]) == [(0, BEGIN), (10, CALL), (20, END), (0, PUT)]
    assert nodes["reader"][3].payload == 1


def test_what_happened_in_one_microsecond_waits_for_no_circle() -> None:
    """The thread begins, and is done with the batch, when main's wait for it ends and the next begins."""
    read, wait = span("data", "read", batch=0), span("data", "wait", batch=0)
    following = span("data", "read", batch=1)
    nodes = order(
        main=[(0, 100, wait), (100, 100, span("data", "wait", batch=1))],
        reader=[(100, 0, read), (100, 0, following)],
    )
    kinds = [node.kind for node in nodes["main"]]
    assert kinds.index(START) < kinds.index(TAKE)
    made = [(node.kind, node.payload) for node in nodes["reader"] if node.kind in (PUT, LIMIT)]
    assert made.index((PUT, 1)) == 0


def test_a_reader_waits_for_room() -> None:
    """Two batches ahead at most: the third began 5 us after the first was taken at 1000."""
    reads = [(begin, 50, span("data", "read", batch=n)) for n, begin in enumerate((0, 60, 1005, 2010))]
    waits = [(990 + 1000 * n, 10, span("data", "wait", batch=n)) for n in range(4)]
    nodes = order(main=waits, reader=reads)["reader"]
    limits = [(node.think, node.payload) for node in nodes if node.kind == LIMIT]
    assert limits == [(0, 1), (0, 2)]  # how many must be taken before batches 2 and 3
    begins = [node.think for node in nodes if node.kind == BEGIN]
    assert begins == [0, 10, 5, 10]  # after the batch was taken, not after the one before was read


def test_a_wait_for_what_nobody_made_is_time_to_think() -> None:
    nodes = order(main=[(0, 500, span("data", "wait", batch=3)), (520, 5, "a")])["main"]
    assert times(nodes) == [(0, BEGIN), (500, END), (20, CALL)]


def test_batches_of_two_epochs_have_the_same_numbers() -> None:
    """Each epoch has a thread of its own in the trainer; here one thread reads both."""
    reads = [(100 * n, 50, span("data", "read", batch=n % 2)) for n in range(4)]
    waits = [(100 * n + 40, 30, span("data", "wait", batch=n % 2)) for n in range(4)]
    nodes = order(main=waits, reader=reads)
    assert [node.payload[1] for node in nodes["main"] if node.kind == TAKE] == [1, 2, 3, 4]
    assert [node.payload for node in nodes["reader"] if node.kind == PUT] == [1, 2, 3, 4]


def test_ranks_meet_after_steps_and_evaluations() -> None:
    nodes = order(
        main=[
            (0, 50, span("train", "step", epoch=0, step=1, batch=0)),
            (60, 50, span("train", "report")),
            (120, 50, span("eval", "evaluate", epoch=0)),
        ]
    )["main"]
    keys = [node.payload for node in nodes if node.kind == BARRIER]
    assert keys == [("step", 0, 1, 0), ("evaluate", 0, None, None)]


def test_waiting_for_others_is_no_thinking() -> None:
    """It is taken from the end of the step, and never from what was before the step."""
    step = span("train", "step", epoch=0, step=1, batch=0)
    nodes = order(main=[(0, 10, "a"), (100, 200, step), (150, 10, "b")])["main"]
    (key,) = [node.payload for node in nodes if node.kind == BARRIER]
    assert times(nodes) == [(0, CALL), (90, BEGIN), (50, CALL), (140, END), (0, BARRIER)]
    assert times(take_out_waits(nodes, {key: 60})) == [
        (0, CALL),
        (90, BEGIN),
        (50, CALL),
        (80, END),
        (0, BARRIER),
    ]
    gone = [(0, CALL), (90, BEGIN), (0, CALL), (0, END), (0, BARRIER)]
    assert times(take_out_waits(nodes, {key: 10_000})) == gone
    assert take_out_waits(nodes, {("step", 0, 2, 1): 60}) == nodes
