"""The emulator runs right kernels right, and catches what a GPU would silently get wrong."""

import subprocess

import pytest

from emulator import build

PLANTED = build.EMULATOR / "planted.cpp"
pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs g++ or clang++")


@pytest.fixture(scope="module")
def run(pytestconfig):
    program = build.build("planted", (PLANTED,), pytestconfig.cache.mkdir("emulator"), shared=False)
    return lambda kernel: subprocess.run([program, kernel], capture_output=True, text=True)


def values(process, count: int) -> list[float]:
    assert process.returncode == 0, process.stdout
    return [float(v) for v in process.stdout.split()[:count]]


def test_barriers(run):
    assert values(run("barrier"), 64) == list(range(63, -1, -1))
    assert values(run("warp_barrier"), 32) == list(range(31, -1, -1))


def test_shuffles(run):
    """The same shuffles, lane by lane."""
    expected = []
    for warp in (0, 1):
        x = [float(warp * 32 + lane) for lane in range(32)]
        v = [x[lane ^ 16] + x[lane + 1 if lane % 8 < 7 else lane] for lane in range(32)]
        expected += [v[lane] + v[3] + v[lane - 2 if lane >= 2 else lane] for lane in range(32)]
    assert values(run("shuffles"), 64) == expected


def test_votes(run):
    assert values(run("votes"), 32) == [31 + 100 + 1000] * 32


def test_a_block_smaller_than_a_warp(run):
    assert values(run("half_warp"), 8) == [28] * 8


def test_dynamic_shared_memory(run):
    assert values(run("dynamic"), 16) == [2 * y + 1 + 8 * b for b in (0, 1) for y in range(4) for _ in (0, 1)]


def test_block_sum(run):
    assert values(run("block_sum"), 96) == [sum(range(96)) + 96 * 100 + 192 * 1000] * 96


@pytest.mark.parametrize("kernel", ["async", "async_first_group"])
def test_asynchronous_copies(run, kernel):
    """What the thread opposite copied; zeros where a copy was not valid."""
    first = [float(4 * (31 - t) + i) for t in range(32) for i in range(4)]
    second = [float(4 * t + i) * (t % 2 == 0) for t in range(32) for i in range(4)]
    assert values(run(kernel), 256) == first + second


A = [[(3 * i + 5 * k) % 11 - 4 for k in range(16)] for i in range(16)]
B = [[(7 * k + 2 * n) % 13 - 5 for n in range(8)] for k in range(16)]
PRODUCT = [float(sum(A[i][k] * B[k][n] for k in range(16))) for i in range(16) for n in range(8)]


@pytest.mark.parametrize("kernel", ["product", "product_of_rows"])
def test_tensor_core_product(run, kernel):
    assert values(run(kernel), 128) == PRODUCT


@pytest.mark.parametrize("bug", ["left_transposed", "right_transposed", "result_transposed", "right_order"])
def test_a_wrong_fragment_gives_another_product(run, bug):
    assert values(run(f"product_{bug}"), 128) != PRODUCT


@pytest.mark.parametrize(
    ("kernel", "text"),
    [
        ("async_missing_wait", "read of shared `stages`, byte 496, while a copy to it is in flight"),
        ("async_wait_for_the_wrong_group", "read of shared `stages`, byte 496, while a copy to it is in flight"),
        ("async_missing_commit", "read of shared `tile`, byte 0, while a copy to it is in flight"),
        ("async_missing_barrier", "race on shared `stages`"),
        ("async_stage_reused_too_early", "race on shared `stages`, byte 240: read after it was written by thread 15"),
        ("async_never_waited", "returns while copies to shared memory are in flight"),
        ("async_misaligned", "misaligned write of shared memory"),
        ("product_of_half_a_warp", "ldmatrix needs a whole warp"),
        ("missing_barrier", "race on shared `tile`, byte 128: written while read by thread 31 without a barrier"),
        ("warp_barrier_is_not_enough", "race on shared `tile`"),
        ("write_after_read", "thread (1, 0, 0): race on shared `tile`, byte 4: written while read by thread 0 without"),
        ("two_writers", "race on shared `tile`, byte 0: written also by thread 0 without a barrier"),
        ("block_sum_on_one_buffer", "race on shared `shared`"),
        ("divergent_barrier", "divergent barrier: block (0, 0, 0) thread (0, 0, 0) waits at planted.cpp:"),
        ("early_return", "thread (13, 0, 0) has returned"),
        ("missing_lane", "shuffle at cuda.cuh:"),
        ("mask_without_caller", "the mask misses the calling lane"),
        ("lane_outside_mask", "lane 0 shuffles from lane 16, outside of the mask"),
        ("shared_out_of_bounds", "thread (63, 0, 0): write of shared `tile` out of bounds: byte 256 of 256"),
        ("shared_unwritten", "read of shared `tile` before it was written"),
        ("shared_of_another_block", "block (1, 0, 0) thread (0, 0, 0): read of shared `tile` before it was written"),
        ("global_out_of_bounds", "thread (64, 0, 0): read of 4 bytes of global memory outside of every tensor"),
        ("misaligned_pack", "misaligned read of 16 bytes of global memory"),
        ("too_many_threads", "launch: bad grid or block size"),
        ("too_much_shared", "launch: more shared memory than a block can have"),
    ],
)
def test_planted_bugs_are_caught(run, kernel, text):
    process = run(kernel)
    assert process.returncode == 1 and text in process.stdout, process.stdout


def test_address_sanitizer(pytestconfig):
    """What does not go through the checked accesses; right kernels run clean, switches of stacks included."""
    program = build.build(
        "planted_asan", (PLANTED,), pytestconfig.cache.mkdir("emulator"), build.SANITIZE, shared=False
    )
    process = subprocess.run([program, "raw_out_of_bounds"], capture_output=True, text=True)
    assert process.returncode != 0 and "heap-buffer-overflow" in process.stderr, process.stderr
    for kernel in ("barrier", "shuffles", "block_sum", "dynamic", "async", "product", "missing_barrier"):
        process = subprocess.run([program, kernel], capture_output=True, text=True)
        assert "AddressSanitizer" not in process.stderr and process.returncode == (kernel == "missing_barrier"), (
            process.stderr
        )


def test_it_stays_small():
    files = ("emulator.h", "emulator.cpp", "fiber.h", "module.cpp", "build.py", "device.py")
    lines = [len((build.EMULATOR / f).read_text().splitlines()) for f in files]
    assert max(lines) < 500 and sum(lines) < 950
