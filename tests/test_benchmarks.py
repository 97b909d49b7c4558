"""The benchmarks: how they measure and report, and that every suite runs and finds equal results."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

# Run from anywhere: `benchmarks` lives in the root of the repository, which pytest does not put on the path.
sys.path.insert(0, str(Path(__file__).parents[1]))

pytest.importorskip("diffusers")
harness = pytest.importorskip("benchmarks.harness")

SMOKE = harness.Settings(rounds=2, warmup=0, compile=False, quick=True)


pytestmark = pytest.mark.usefixtures("one_thread")


def variants(calls: list):
    return {name: (lambda name=name: calls.append(name)) for name in ("a", "b", "c")}


def test_order_rotates():
    calls: list[str] = []
    harness.measure(variants(calls), harness.Settings(rounds=4, warmup=0), cold=True)
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"


def test_short_calls_are_repeated_and_counted_once():
    calls: list[str] = []
    samples = harness.measure(variants(calls), harness.Settings(rounds=3, warmup=0))
    assert len(calls) > 100
    assert all(len(s) == 3 and max(s) < 1e-3 for s in samples.values())


def test_long_cases_stop_early():
    settings = harness.Settings(rounds=1000, warmup=0, seconds=0.0)
    samples = harness.measure(variants([]), settings)
    assert {len(s) for s in samples.values()} == {harness.FEWEST_ROUNDS}


def test_timing_is_median_and_quartiles():
    assert harness.Timing.of([5.0, 1.0, 3.0, 2.0, 4.0]) == harness.Timing(3.0, 2.0, 4.0, 5)
    assert harness.Timing.of([2.0]) == harness.Timing(2.0, 2.0, 2.0, 1)


def test_ratio_is_taken_within_rounds():
    # A machine that slows down tenfold in one round: the ratio of medians would be 1.
    samples = {"a": [2.0, 20.0, 200.0], "b": [1.0, 10.0, 100.0]}
    assert harness.ratio(samples, "a", "b") == 2.0


@pytest.mark.parametrize("wrong", [lambda: torch.ones(3) * 1.1, lambda: torch.ones(4), lambda: torch.ones(3) / 0])
def test_no_speedup_without_agreement(wrong):
    good = {"diffusers": lambda: torch.ones(3), "ours": lambda: torch.ones(3)}
    case = harness.compare("s", "n", good, SMOKE, tolerance=1e-3, tags={})
    assert case.agrees and case.speedups.keys() == {"ours"}
    case = harness.compare("s", "n", {**good, "ours": wrong}, SMOKE, tolerance=1e-3, tags={})
    assert not case.agrees and case.speedups == {} and harness.speedup(case, "ours") is None


def test_bars():
    assert harness.Bar("b", 1.5, 1.5).verdict == "reached"
    assert harness.Bar("b", 1.5, 1.4).verdict == "missed"
    assert harness.Bar("b", 1.2, 1.1, at_most=True).verdict == "reached"
    assert harness.Bar("b", 1.2, None).verdict == "not measured"


def test_speedup_over_another_variant():
    case = harness.Case("s", "n", {}, {}, {"ours": 3.0, "diffusers compiled": 1.5})
    assert harness.speedup(case, "ours") == 3.0
    assert harness.speedup(case, "ours", "diffusers compiled") == 2.0


def test_peak_extra_memory():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of resident memory is read from Linux")
    measured = harness.peak_extra_memory(lambda: torch.ones(64 << 18).sum(), "cpu")
    assert 60 << 20 < measured < 100 << 20


def test_stage_times_restores_methods():
    class Part:
        def work(self):
            return 7

    part = Part()
    with harness.stage_times("cpu", {"work": (part, "work")}) as seconds:
        assert part.work() == 7
    assert seconds["work"] > 0 and not vars(part)


def test_report_round_trip_table_and_plot(tmp_path):
    from rich.console import Console

    from benchmarks.report import plot, print_report

    case = harness.Case(
        "ops", "add", {"op": "add"}, {"diffusers": harness.Timing.of([0.2]), "ours": harness.Timing.of([0.1])},
        {"ours": 2.0}, bytes=10**6, roof={"ours": 0.5}, memory={"ours": 10**6}, goals={"ours": 1.5},
        stages={"ours": {"decode": 0.01}},
    )  # fmt: skip
    other = harness.Case("ops", "sub", {}, case.timings, {}, difference=1.0, tolerance=0.1)
    machine = harness.describe_machine("cpu")
    report = harness.Report("2000-01-01", machine, {"copy": 1e10}, [case, other], [harness.Bar("add", 1.5, 2.0)])
    report.save(tmp_path / "r.json")
    assert harness.Report.load(tmp_path / "r.json") == report
    console = Console(record=True, width=160, file=(tmp_path / "out").open("w"))
    print_report(report, console)
    text = console.export_text()
    assert all(part in text for part in ("2.00x", "reached", "50%", "results differ", "decode 10 ms"))
    plot(report, tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 1000


def test_machine_names_no_host_or_path():
    import json
    import platform

    text = json.dumps(harness.describe_machine("cpu"))
    assert platform.node() not in text and str(Path.home()) not in text and str(Path(__file__).parents[1]) not in text


def test_ops():
    from benchmarks import bench_ops
    from qwen_image_fast.ops.linear_amx import AVAILABLE

    cases = list(bench_ops.cases(SMOKE, heads=2, side=6, txt=8))
    assert len(cases) == 30 + 2 * AVAILABLE and all(c.agrees for c in cases), [c for c in cases if not c.agrees]
    assert [b.verdict for b in bench_ops.bars(cases)].count("not measured") == 0


def test_block():
    from benchmarks import bench_block

    (case,) = bench_block.cases(SMOKE, grids=((4, 6),), heads=2, txt=5)
    assert case.agrees and case.flops == 2 * 29 * 12 * 256**2 + 4 * 29**2 * 256
    assert bench_block.bars([case])[0].verdict == "not measured"


def test_editing():
    from benchmarks import bench_editing

    cases = list(bench_editing.cases(SMOKE, heads=2, grid=(4, 6), txt=5))
    assert len(cases) == 4 and all(c.agrees for c in cases), [c for c in cases if not c.agrees]
    assert [b.verdict == "not measured" for b in bench_editing.bars(cases)] == [False, True, False]
    assert cases[-1].memory["ours"] < 10**6 and cases[1].tags["references"] == cases[0].tags["references"] == 2


def test_pipeline():
    pytest.importorskip("diffusers")
    from benchmarks import bench_pipeline

    (case,) = bench_pipeline.cases(SMOKE, steps=2)
    assert case.agrees, f"images differ by {case.difference} of 255"
    assert case.stages.keys() == {"diffusers", "ours", "diffusers accelerated"}


def test_vae():
    from benchmarks import bench_vae

    cases = list(bench_vae.cases(SMOKE, base_dim=16))
    assert len(cases) == 14 and all(c.agrees for c in cases), [c for c in cases if not c.agrees]
    bars = bench_vae.bars(cases)
    assert len(bars) == 6 and sum(b.verdict == "not measured" for b in bars) == 1


def test_loading():
    from benchmarks import bench_loading

    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory of a process is read from Linux")
    (case,) = bench_loading.cases(harness.Settings(rounds=1), layers=1, heads=1)
    assert case.memory.keys() == {"diffusers", "ours"} and case.bytes > 10**6


def test_run_writes_results(tmp_path, capsys):
    from benchmarks import run

    report = run.main(["transformer", "--quick", "--device", "cpu", "--output", str(tmp_path)])
    assert len(report.cases) == 2 and all(c.agrees for c in report.cases)
    (result,) = tmp_path.glob("*-transformer-quick.json")
    assert harness.Report.load(result) == report and result.with_suffix(".png").exists()
    assert "bars" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run.main(["no-such-suite"])


def test_drift_of_edits_is_measured():
    """A text that has been moved by known steps, on a ground that became a little darker."""
    from benchmarks import editing_drift

    pixels = np.full((40, 60, 3), 250, dtype=np.uint8)
    pixels[15:25, 20:40:3] = (200, 0, 0)
    first = Image.fromarray(pixels)
    found = editing_drift.compare(first, Image.fromarray(np.roll(pixels, (2, -1), (0, 1)) - 1))
    assert (round(found["down"], 1), round(found["right"], 1)) == (2, -1)
    assert found["psnr_away"] == pytest.approx(20 * np.log10(255))


def test_int8(monkeypatch, tmp_path):
    """One small block, and a small product."""
    from benchmarks import int8

    monkeypatch.setattr(int8, "CONFIG", {"num_layers": 1, "num_attention_heads": 2})
    monkeypatch.setattr(int8, "GRIDS", {64: (4, 4)})
    monkeypatch.setattr(int8, "BARS", {64: 5.5})
    monkeypatch.setattr(int8, "PRODUCTS", ((40, 256, 64),))
    monkeypatch.setattr(sys, "argv", ["int8", "--rounds", "1", "--out", str(tmp_path / "x.json")])
    int8.main()
    found = json.loads((tmp_path / "x.json").read_text())
    (step,) = found["steps"]
    assert {"diffusers float32", "ours int8", "ours int4"} <= set(step["seconds"])
    errors = step["relative_error"]
    assert 0 < errors["ours int8"] < 0.05 and errors["ours int8"] < errors["ours int4"] < 0.3, errors
    assert found["products"][0]["operations_per_second"] > 0 and set(found["reached"]) >= {"64 px"}


def test_parts_of_the_error_of_fewer_bits(tmp_path, monkeypatch, capsys):
    from benchmarks import precision_parts

    monkeypatch.setattr(
        sys, "argv", ["precision_parts", "--prompts", "1", "--whole", "--out", str(tmp_path / "x.json")]
    )
    precision_parts.main()
    errors = json.loads((tmp_path / "x.json").read_text())["velocity_errors"]
    eight, four, all_blocks = (
        errors[f"{name}, in float32"]["0.4"] for name in ("8 bits", "4 bits", "4 bits, all blocks")
    )
    assert 0 < eight < four < all_blocks < 0.2 and "4 bits, all blocks, in bfloat16" in capsys.readouterr().out


def test_texts_of_fewer_bits(tmp_path, monkeypatch):
    pytest.importorskip("rapidocr")
    from benchmarks import precision_texts

    monkeypatch.setattr(precision_texts, "STEPS", 2)
    monkeypatch.setattr(sys, "argv", ["precision_texts", "--count", "2", "--out", str(tmp_path / "x.json")])
    precision_texts.main()
    found = json.loads((tmp_path / "x.json").read_text())["by_precision"]
    assert list(found) == ["bfloat16", "int8", "int4"] and found["int8"]["bar"] < found["int4"]["bar"]
    assert 25 < found["int4"]["psnr"]["median"] < found["int8"]["psnr"]["median"] < 99
    for name in precision_texts.BARS:
        lost = {m: found["bfloat16"]["read"][m] - found[name]["read"][m] for m in precision_texts.METRICS}
        assert found[name]["lost"] == lost and found[name]["reached"] == (max(lost.values()) <= found[name]["bar"])


def test_points_of_post_training(tmp_path):
    """Won, lost and the share by hand; what a call has made is read and not made again."""
    pytest.importorskip("rapidocr")
    from benchmarks import post_training

    start = {"zh": {"one": [True, False, False, False]}}
    runs = [{"seconds": 9.5, "right": {"zh": {"one": [False, True, True, True]}}}]
    begin, end = post_training.points(start, runs)
    assert begin["seconds"] == 0 and begin["zh, one"]["right"] == 1 and begin["zh, one"]["p"] == 1
    assert end["seconds"] == 9.5 and end["zh, one"] | {"interval": 0} == {
        "right": 3, "of": 4, "interval": 0, "won": 3, "lost": 1, "p": 0.625,
    }  # fmt: skip
    assert "DPO, seed 0: 10 s; zh, one: 3 of 4 (+3 -1, p = 0.625)" in post_training.table({"DPO": [[begin, end]]})
    world = post_training.WORLDS["texts"]
    right = {"SFT": ([True, False], [False, False]), "DPO": ([True, True], [True, False])}
    seeds = {method: [{"zh": {world.judges[0]: one}} for one in own] for method, own in right.items()}
    (found,) = post_training.against(world, seeds).values()
    assert found == {"DPO": [{"won": 1, "lost": 0, "p": 1.0}] * 2 + [{"won": 2, "lost": 0, "p": 0.5}]}
    assert post_training.against(world, {"DPO": []}) == {}
    assert post_training.once(tmp_path / "a.json", lambda: [1.5]) == [1.5]
    assert post_training.once(tmp_path / "a.json", lambda: [2.5]) == [1.5]


@pytest.mark.parametrize(
    "world, method, judged, count",
    [("texts", "DPO", "zh, reader at 736 px", 4), ("shapes", "SFT, own best", "shapes, TinyEval", 4)],
)
def test_post_training_compares(world, method, judged, count, tmp_path, monkeypatch):
    """One method, too short to learn: a second call draws nothing."""
    pytest.importorskip("rapidocr")
    fonts = pytest.importorskip(
        "qwen_image_fast.training.synthesis.fonts", reason="fontTools reads what glyphs there are"
    )
    if world == "texts" and not any(face.is_chinese for face in fonts.find_fonts()):
        pytest.skip("no Chinese font: install Debian's fonts-wqy-microhei")
    from benchmarks import post_training

    out, picture = tmp_path / "found.json", tmp_path / "curves.png"
    call = ["post_training", world, "--work", str(tmp_path / "work"), "--seeds", "1", "--legs", "1", "--small",
            "--methods", method, "--out", str(out), "--picture", str(picture)]  # fmt: skip
    monkeypatch.setattr("sys.argv", call)
    post_training.main()
    found = json.loads(out.read_text())
    (run,) = found["curves"][method]
    assert len(run) == 2 and run[1]["seconds"] > 0 and run[1][judged]["of"] == count
    assert picture.stat().st_size > 1000
    monkeypatch.setattr(post_training, "train", None)
    monkeypatch.setitem(post_training.WORLDS, world, dataclasses.replace(post_training.WORLDS[world], judged=None))
    post_training.main()
    assert json.loads(out.read_text()) == found
    monkeypatch.setattr("sys.argv", [*call, "--seeds", "2", "--finished"])
    post_training.main()  # of the second seed nothing is there
    assert json.loads(out.read_text()) == found


def test_a_method_of_another_world_is_refused(monkeypatch, capsys):
    pytest.importorskip("rapidocr")
    from benchmarks import post_training

    monkeypatch.setattr("sys.argv", ["post_training", "shapes", "--work", "x", "--methods", "SFT"])
    with pytest.raises(SystemExit):
        post_training.main()
    assert "--methods must be of DPO, SFT, own best" in capsys.readouterr().err
