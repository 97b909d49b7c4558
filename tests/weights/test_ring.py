"""The ring of buffers: what is read when, errors, the order of copies to a GPU, which the CPU plays; plans."""

import threading
from contextlib import contextmanager

import pytest
import torch

from qwen_image_fast.weights.cuda_lane import CudaLane
from qwen_image_fast.weights.plan import DISK_RATE, PartSize, make_plan, spread
from qwen_image_fast.weights.ring import Kind, Layout, Ring, Track
from qwen_image_fast.weights.sources import MemorySource, TensorSource

SIZE = 64


class Numbered(TensorSource):
    """A unit full of its number, which says when it was read."""

    def __init__(self, number, log, fails=()):
        super().__init__({"a": torch.full((SIZE,), float(number)), "b": torch.full((3, 5), -float(number))})
        self.number, self.log, self.fails = number, log, fails

    def reads(self, views):
        self.log.append(self.number)
        if self.number in self.fails:
            return [self.fail]
        return super().reads(views)

    def fail(self):
        raise OSError(f"unit {self.number} is damaged")


def new_track(ring, numbers, log, again=True, fails=()):
    return Track(ring, [None if n is None else Numbered(n, log, fails) for n in numbers], again)


def use(ring, track, i):
    views = ring.enter(track, i)
    found = views["a"].clone(), views["b"].clone()
    ring.leave(track, i)
    assert found[0].unique().numel() == 1 and torch.equal(found[1].unique(), -found[0].unique())
    return int(found[0][0])


def settled(ring):
    """After what is being read."""
    ring._order.submit(lambda: None).result()


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("numbers", [[0, 1, 2, 3, 4], [None, 1, None, 3, 4], [0, 1], [None, None, 2]])
def test_every_step_sees_its_weights_and_each_is_read_once_for_it(count, numbers):
    log = []
    ring = Ring(Numbered(0, log).layout.nbytes, count)
    track = new_track(ring, numbers, log)
    streamed = [n for n in numbers if n is not None]
    for _ in range(3):
        assert [use(ring, track, i) for i in streamed] == streamed
    settled(ring)
    assert log[: 3 * len(streamed)] == streamed * 3
    assert len(log) <= 3 * len(streamed) + count  # what was read ahead for a fourth


def test_the_next_step_begins_with_what_was_read_ahead():
    log = []
    ring = Ring(Numbered(0, log).layout.nbytes, 2)
    track = new_track(ring, [0, 1, 2], log)
    for i in range(3):
        use(ring, track, i)
    settled(ring)
    assert log[:4] == [0, 1, 2, 0]  # before the next step asks
    before = list(log)
    views = ring.enter(track, 0)
    assert int(views["a"][0]) == 0 and log == before  # and is not read again
    ring.leave(track, 0)


def test_a_track_that_is_used_once_reads_nothing_behind_its_end():
    log = []
    ring = Ring(Numbered(0, log).layout.nbytes, 3)
    track = new_track(ring, [0, 1, 2, 3], log, again=False)
    for i in range(4):
        use(ring, track, i)
    settled(ring)
    assert log == [0, 1, 2, 3]


def test_tracks_share_the_buffers_and_any_order_is_right():
    log = []
    ring = Ring(Numbered(0, log).layout.nbytes, 2)
    tracks = [new_track(ring, range(k, k + 4), log, again=bool(k)) for k in (0, 10)]
    order = torch.randint(0, 8, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    for k in order:
        assert use(ring, tracks[k // 4], k % 4) == 10 * (k // 4) + k % 4


def test_an_error_of_reading_is_raised_where_the_weights_are_used_and_not_kept():
    log, fails = [], {2}
    ring = Ring(Numbered(0, log).layout.nbytes, 2)
    track = new_track(ring, [0, 1, 2, 3], log, fails=fails)
    assert [use(ring, track, i) for i in (0, 1)] == [0, 1]
    for _ in range(2):
        with pytest.raises(OSError, match="unit 2 is damaged"):
            ring.enter(track, 2)
    fails.clear()
    assert [use(ring, track, i) for i in (2, 3, 0)] == [2, 3, 0]


def test_a_unit_that_was_left_by_an_exception_can_be_used_again():
    log = []
    ring = Ring(Numbered(0, log).layout.nbytes, 2)
    track = new_track(ring, [0, 1, 2], log)
    ring.enter(track, 1)  # and never left
    assert [use(ring, track, i) for i in (0, 1, 2, 0)] == [0, 1, 2, 0]


def test_a_ring_needs_two_buffers_and_is_not_copied():
    with pytest.raises(ValueError, match="count must be at least 2, got 1"):
        Ring(64, 1)
    with pytest.raises(TypeError, match="streamed cannot be copied or pickled; load it again"):
        torch.save(Ring(64, 2), "/dev/null")


def test_rates_are_of_the_time_in_which_something_was_read():
    ticks = iter(range(10**6))
    lock = threading.Lock()

    def clock():
        with lock:
            return float(next(ticks))

    log = []
    ring = Ring(Numbered(0, log).layout.nbytes, 2, clock=clock)
    track = new_track(ring, [0, 1], log, again=False)
    for i in range(2):
        use(ring, track, i)
    assert ring.rate.read == 2 * track.sources[0].nbytes and ring.rate.reading >= 2 and ring.rate.waited >= 2
    assert DISK_RATE > 0


def test_views_are_aligned_and_lie_apart():
    kinds = {"a": Kind(torch.int8, torch.Size((3,))), "b": Kind(torch.float32, torch.Size((2, 2)))}
    layout = Layout({**kinds, "c": Kind(torch.bfloat16, torch.Size(()))})
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)
    views = layout.views(buffer)
    for value, view in enumerate(views.values(), 1):
        view.fill_(value)
        assert (view.data_ptr() - buffer.data_ptr()) % 64 == 0
    assert [v.unique().item() for v in views.values()] == [1, 2, 3]
    assert views["b"].shape == (2, 2) and views["c"].shape == ()


# ---- a GPU, played by the CPU --------------------------------------------------------------------------------------


class Event:
    def __init__(self):
        self.after = lambda: None

    def record(self, stream):
        self.after = stream.run_all

    def synchronize(self):
        self.after()


class Stream:
    """Work that runs as late as it may: when somebody waits for it."""

    def __init__(self, late, lock):
        self.late, self.queue, self.lock = late, [], lock

    def add(self, work):
        with self.lock:
            self.queue.append(work)
        if not self.late:
            self.run_all()

    def wait_event(self, event):
        self.add(event.after)

    def run_all(self):
        with self.lock:
            while self.queue:
                self.queue.pop(0)()


class Played:
    """The streams of CUDA. late: the copies' work waits; else that of the computation does."""

    def __init__(self, late):
        # One lock for both, which wait for one another on two threads.
        lock = threading.RLock()
        self.copies, self.compute, self.here = Stream(late, lock), Stream(not late, lock), []

    def new_stream(self):
        return self.copies

    def computing(self):
        return self.compute

    def new_event(self):
        return Event()

    @contextmanager
    def on(self, stream):
        self.here.append(stream)
        yield
        self.here.pop()

    def copy(self, to, source):
        self.here[-1].add(lambda: to.copy_(source))

    def empty(self, nbytes):
        return torch.full((nbytes,), 255, dtype=torch.uint8)

    pinned = empty


def as_memory(source):
    memory = torch.empty(source.layout.nbytes, dtype=torch.uint8)
    for read in source.reads(source.layout.views(memory)):
        read()
    return MemorySource(memory, source.layout)


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("pinned", [True, False])
def test_copies_to_a_gpu_wait_for_what_uses_the_buffer_and_are_waited_for(late, count, pinned):
    """Copies as late as they may be, or the computation: without an event on either side a number would be wrong."""
    streams, log, found = Played(late), [], []
    ring = Ring(Numbered(0, log).layout.nbytes, count, CudaLane(streams))
    track = new_track(ring, [0, 1, 2, 3, 4], log)
    if pinned:
        track.sources = [as_memory(source) for source in track.sources]
    for _ in range(2):
        for i in range(5):
            views = ring.enter(track, i)
            streams.compute.add(lambda view=views["a"]: found.append(view.clone()))
            ring.leave(track, i)
    settled(ring)
    streams.compute.run_all()
    assert [int(v[0]) for v in found] == [0, 1, 2, 3, 4] * 2
    assert all(v.unique().numel() == 1 for v in found)


# ---- plans ---------------------------------------------------------------------------------------------------------

PARTS = [
    PartSize("transformer", 10, {"blocks": [100] * 10, "modulation": [50] * 10}),
    PartSize("text_encoder", 20, {"layers": [90] * 4}),
    PartSize("vae", 5),
]


@pytest.mark.parametrize(
    "limit, buffers, blocks, layers",
    [(1900, 0, 10, 4), (1899, 3, 10, 4), (1235, 3, 8, 1), (340, 3, 0, 0), (339, 2, 0, 1), (240, 2, 0, 0)],
)
def test_what_stays(limit, buffers, blocks, layers):
    plan = make_plan(PARTS, limit, base=3, working=2)
    assert plan.buffers == buffers
    if buffers:
        assert len(plan.stays["transformer", "blocks"]) == blocks
        assert len(plan.stays["text_encoder", "layers"]) == layers
    streamed = (100 * (10 - blocks), 90 * (4 - layers), 500 if buffers else 0)
    assert tuple(map(plan.streamed, ("blocks", "layers", "modulation"))) == streamed
    assert plan.peak == 1900 - sum(streamed) + 100 * buffers <= limit
    assert dict(plan.rows())["peak"]


def test_a_limit_that_is_too_small_is_a_sentence():
    with pytest.raises(ValueError, match=r"^memory_limit must be at least 1MB, got 0.0 MB: the process takes 0.0 MB"):
        make_plan(PARTS, 239, base=3, working=2)
    with pytest.raises(
        ValueError, match=r"^memory_limit must be at least 2.3GB, got 2.0 GB: .* two buffers of a block"
    ):
        make_plan([PartSize("x", 0, {"blocks": [10**9] * 9})], 2 * 10**9, 2 * 10**8, 10**7)


@pytest.mark.parametrize("count, of", [(0, 60), (59, 60), (30, 60), (27, 60), (60, 60), (1, 3)])
def test_streamed_units_lie_as_far_apart_as_they_can(count, of):
    streamed = sorted(set(range(of)) - spread(count, of))
    assert len(streamed) == of - count
    gaps = [b - a for a, b in zip(streamed, streamed[1:])]
    assert not gaps or max(gaps) - min(gaps) <= 1
