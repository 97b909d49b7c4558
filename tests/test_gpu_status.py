"""The page of what has run on a GPU, and the bars, from results."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
pytest.importorskip("diffusers")

from benchmarks import gpu_bench, gpu_check, gpu_status


def test_flops_of_the_released_model():
    """226.5 MFLOP per token and block, and 4 tokens^2 width of attention."""
    assert gpu_bench.flops(1, 3072, 1) == 2 * 12 * 3072**2 + 4 * 3072
    assert gpu_bench.flops(4096 + 50, 3072, 60) == pytest.approx(69.0e12, rel=0.002)


def test_page_of_no_results():
    page = gpu_status.page([])
    assert "Nothing yet" in page
    for stage in gpu_check.STAGES[2:]:
        assert stage.shows and f"| {stage.name} | {stage.shows} |" in page


def test_bars():
    """Of an H200 alone; the faster of our ways, half a guidance pair."""
    copies = [{"op": "gelu_tanh", "dtype": "bfloat16", "forward of copy": 0.93, "backward of copy": 0.87},
              {"op": "gelu_tanh", "dtype": "float32", "forward of copy": 0.1, "backward of copy": 0.1}]  # fmt: skip
    times = {"ours": 232.0, "ours, CUDA graph": 228.0, "diffusers": 342.0, "diffusers compiled": 250.8}
    result = {"gpu": "NVIDIA H200", "ops": copies, "transformer": [{"pixels": 1024, "pair ms": times}],
              "stages": {s: {"status": "passed"} for s in ("memcheck", "racecheck")}}  # fmt: skip
    rows = [line.split(" | ")[1:] for line in gpu_status.bars([{**result, "gpu": "A100"}, result]).splitlines()[5:]]
    assert rows == [
        ["at most 115", "114", "met |"], ["at most 32", "not measured", " |"], ["at least 1.5", "1.5", "met |"],
        ["at least 1.15", "1.1", "missed |"], ["at least 88", "87", "missed |"], ["at most 0", "0", "met |"],
        ["at most 70", "not measured", " |"],
    ]  # fmt: skip
    assert gpu_status.bars([{**result, "gpu": "A100"}]) == gpu_status.bars([])
    found, missing = ({"status": "failed", "output": o} for o in ("exit status 9\n", "compute-sanitizer was not found"))
    for racecheck, failed in ((found, 1), (missing, None)):
        stages = {"memcheck": {"status": "passed"}, "racecheck": racecheck}
        assert gpu_status.sanitizers_failed({"stages": stages}) == failed


def test_page_is_up_to_date():
    assert gpu_status.TARGET.read_text() == gpu_status.page(gpu_status.results())


def test_page_of_results():
    op = {"op": "gelu_tanh", "dtype": "bfloat16", "label": "4096 x 12288", "forward GB/s": 2900.4,
          "forward of copy": 0.951, "backward of copy": 0.9}  # fmt: skip
    attention = {"op": "joint_attention", "dtype": "bfloat16", "label": "4096 image + 64 text tokens",
                 "forward TFLOP/s": {"ours": 500.2, "own kernel": 300.0}, "kernels": ["cudnn of torch", "varlen"],
                 "backward TFLOP/s": {"ours": 400.0}}  # fmt: skip
    times = {"ours": 231.25, "diffusers": 370.0}
    result = {
        "date": "2000-01-01", "gpu": "Some GPU", "torch": "2.11", "nvcc": "13.0", "driver": "580",
        "stages": {"build": {"status": "passed", "summary": "for sm_90a", "seconds": 1},
                   "op tests": {"status": "passed"}, "racecheck": {"status": "failed"}},
        "ops": [op, attention], "block": [{"pixels": 512, "block ms": {"ours": 1.25}}],
        "gemms": [{"label": "linear_qkv", "rows": [4096, 50], "depth": 3072, "columns": 3072,
                   "TFLOP/s": {"torch": 600.4, "cutlass large": 650.0}}],
        "transformer": [{"pixels": 1024, "layers": 60, "pair ms": times}],
        "vae": [
            {"task": "decode", "pixels": 1024, "dtype": "bfloat16", "times": 4.3,
             "ms": {"ours": 14.0, "diffusers": 60.0}, "TFLOP/s": 300.0},
            {"task": "layer", "label": "96 -> 96", "TFLOP/s": {"torch": 310.0, "cutlass": 320.0}},
        ],
        "training": [{"layers": 8, "pixels": 1024, "MFU": {"ours": 0.5}}],
    }  # fmt: skip
    text = gpu_status.page([result])
    for part in ("## Some GPU, 2000-01-01", "| build | passed | for sm_90a |", "| memcheck | not run |",
                 "| 2900 | 95% | 90% |", "| 4096 image + 64 text tokens | 500 | 300 | 400 |  |", "| 512 | 1.2 |",
                 "| linear_qkv | 4096 + 50 | 3072 -> 3072 | 600 | 650 |", "| 1024 | 231.2 | 370.0 |",
                 "utilisation ours 50%", "| decode | 1024 | 14.0 | 60.0 | 4.30 | 300 |",
                 "| 96 -> 96 | 310 | 320 |"):  # fmt: skip
        assert part in text
    left = text.split("## Not yet shown on a GPU")[1]
    assert "| op tests |" not in left and "| racecheck | no race on shared memory |" in left
