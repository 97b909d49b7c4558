"""Several processes with gloo make what one makes: forwards, pipelines, the drop-in, tiles."""

import json
from pathlib import Path

import pytest
from several_processes import finish, launch

from qwen_image_fast.parallel.split import Split, parse_split

WORKER = Path(__file__).with_name("ranks_worker.py")
# Of rounding, in float32, after a few steps of a network of a few layers.
ROUNDING = 2e-4


@pytest.mark.parametrize("splits", [["guidance=2", "ulysses=2"], ["guidance=2,ulysses=2"]], ids=["two", "four"])
def test_several_make_what_one_makes(splits):
    ranks = 2 * len(splits[0].split(","))
    found = finish(launch([str(WORKER), *splits], ranks))
    assert [code for code, *_ in found] == [0] * ranks, "\n".join(errors[-3000:] for _, _, errors in found)
    for _, out, _ in found:
        seen = 0
        for line in out.splitlines():
            if not line.startswith("{"):
                continue
            ((split, numbers),) = json.loads(line).items()
            for name, number in numbers.items():
                exact = "ulysses" not in split or "tiles" in name
                if exact and name not in FEW_ROWS:
                    assert number == 0 or "drop_in: tiles" in name, (split, name, number)
                assert number <= ROUNDING, (split, name, number)
                seen += 1
        assert seen == 18 * len(splits)


# Of four samples in one product or two: of so few rows the library sums in another order (serving/alike.py).
FEW_ROWS = {f"forwards: {case}{zero}" for case in ("mixed", "targets", "residuals") for zero in ("", " at zero")}


def test_split():
    assert parse_split("x", "auto", 4, 24) == Split(2, 2) and parse_split("x", "auto", 3, 24) == Split(1, 3)
    assert parse_split("x", "auto", 6, 2 * 9) == Split(2, 3) and parse_split("x", "auto", 8, 8) == Split(2, 4)
    assert parse_split("x", "guidance=2", 2, 6) == Split(2, 1) == parse_split("x", {"guidance": 2}, None, None)
    assert parse_split("x", "guidance=2, ulysses=3", None, 6).ranks == 6


@pytest.mark.parametrize(
    "given, ranks, heads, match",
    [
        ("guidance=3", 3, 24, "x: guidance must be 1 or 2"),
        ("ulysses=4", 4, 6, "x: ulysses must divide the 6 attention heads, got 4"),
        (
            "guidance=2",
            4,
            24,
            "guidance x ulysses must be the number of processes, 4, got 2 x 1; start 2 with",
        ),
        ("auto", 5, 24, "5 processes cannot share 24 attention heads"),
        ("auto", None, 24, "x must be 'auto', or guidance=N and ulysses=N"),
        ("tensor=2", 2, 24, "x must be 'auto', or guidance=N and ulysses=N, such as .*, got 'tensor=2'"),
        ("ulysses=two", 2, 24, "got 'ulysses=two'"),
        ({"ulysses": True}, 1, 24, "got {'ulysses': True}"),
        ("ulysses=0", 0, 24, "ulysses must be at least 1, got 0"),
        ("", 1, 24, "got ''"),
    ],
)
def test_bad_splits(given, ranks, heads, match):
    with pytest.raises(ValueError, match=match):
        parse_split("x", given, ranks, heads)


def test_one_process_alone_is_refused(tiny_folder):
    import qwen_image_fast as q

    pipe = q.QwenImagePipeline.from_pretrained(tiny_folder)
    with pytest.raises(ValueError, match="enable_parallel: parallel needs several processes.*torchrun"):
        pipe.enable_parallel()
