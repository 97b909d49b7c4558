"""What gpu-check measures, on the CPU at small sizes; the table of linear kernels made of it."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
pytest.importorskip("diffusers")

from benchmarks import gpu_bench, gpu_gemms, gpu_vae, linear_table

TINY = {"attention_head_dim": 64, "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (8, 28, 28)}


def measured(suite, tmp_path, **arguments):
    target = tmp_path / f"{suite}.json"
    gpu_bench.main(suite, target, rounds=1, **arguments)
    return json.loads(target.read_text())


def test_measuring_ops(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_bench, "device", lambda: "cpu")
    records = measured("ops", tmp_path, heads=2, side=4, compile=False)
    assert {r["op"] for r in records} >= gpu_bench.BACKWARD_BYTES.keys()
    for r in records:
        assert r["difference"]["ours"] < 0.1 and r["forward ms"]["ours"] > 0 and r["backward ms"]["torch"] > 0
        assert (r["op"] in gpu_bench.BACKWARD_BYTES) == ("forward of copy" in r) != ("forward TFLOP/s" in r)
        assert ("kernels" in r) == (r["op"] == "joint_attention")


def test_measuring_a_block(tmp_path):
    (record,) = measured("block", tmp_path, sides=(4,), heads=1, compile=False)
    assert record["difference"] < 0.1 and record["pixels"] == 64
    assert record["block ms"].keys() == record["TFLOP/s"].keys() == {"ours", "diffusers", "products alone"}


def test_measuring_the_transformer(tmp_path):
    (record,) = measured("transformer", tmp_path, sides=(4,), layers=2, compile=False, **TINY)
    assert record["difference"] < 0.1 and record["pixels"] == 64 and record["layers"] == 2
    assert {"ours", "diffusers"} <= record["pair ms"].keys()


def test_measuring_training(tmp_path):
    (record,) = measured("training", tmp_path, side=4, layers=1, **TINY)
    assert record["step ms"].keys() == {"ours", "diffusers"} and record["TFLOP/s"]["ours"] > 0


def test_measuring_the_vae(tmp_path):
    target = tmp_path / "vae.json"
    gpu_bench.write(gpu_vae.vae((16,), 1, base_dim=8, num_res_blocks=1), target)
    decode, encode = json.loads(target.read_text())
    assert (
        decode["difference"] < 0.1 and decode["flops"] > 0 and decode["ms"].keys() == {"ours", "drop-in", "diffusers"}
    )
    assert encode["task"] == "encode" and encode["difference"] < 0.1


def test_measuring_linear_layers(tmp_path):
    target = tmp_path / "gemms.json"
    gpu_bench.write(gpu_gemms.gemms(width=16, img_rows=(9,), rounds=1), target)
    records = json.loads(target.read_text())
    assert [(r["op"], r["depth"], r["columns"]) for r in records] == [
        ("linear_qkv", 16, 16), ("linear_gelu", 16, 64), ("linear_gate_residual", 16, 16),
        ("linear_gate_residual", 64, 16),
        *(("linear_int8", depth, columns) for depth, columns in ((16, 16), (16, 64), (16, 16), (64, 16))),
    ]  # fmt: skip
    for r in records:
        eight = r["op"] == "linear_int8"
        assert max(r["difference"].values()) < 0.02 and r["TFLOP/s"]["best" if eight else "torch"] > 0
    assert all(0 < r["float8 differs"] < 0.2 and gpu_gemms.FLOAT8 in r["ms"] for r in records[4:])
    assert [r["flops"] for r in records[:4]] == [r["flops"] for r in records[4:]]
    assert records[0]["flops"] == 2 * 3 * (9 + 7) * 16 * 16


def gemm(op, rows, txt, differs=0.0, **ms):
    times = {"torch": 1.0, **{f"cutlass {k}": v for k, v in ms.items()}}
    return {"op": op, "rows": [rows, txt], "depth": 3072, "columns": 12288, "ms": times,
            "difference": {k: differs for k in times if k != "torch"}}  # fmt: skip


def test_table_of_linear_kernels():
    records = [
        gemm("linear_gelu", 1024, 50, large=1.2, small=0.9),
        gemm("linear_gelu", 4096, 50, large=0.8, small=0.9),
        gemm("linear_gelu", 8192, 80, large=0.99, small=1.0),
        gemm("linear_qkv", 4096, 50, large=0.5, small=0.5, differs=0.1),
        gemm("linear_qkv", 8192, 80, large=0.5),
        gemm("linear_qkv", 8192, 999, large=2.0),
        {**gemm("linear_int8", 8192, 80), "ms": {"mma.sync": 0.2, "wgmma": 0.1}},
    ]
    assert linear_table.faster(records) == {
        "linear_gelu 3072 -> 12288": {"1024": "cutlass small", "4096": "cutlass large", "8192": "torch"}
    }
    machine = {"architecture": "90a", "gpu": "Some GPU", "torch": "2", "gemms": records}
    found = linear_table.table("text", [{**machine, "date": "2000-01-02"}, {**machine, "date": "2000-01-01"}])
    assert found["measured_by"] == ["2000-01-02, Some GPU, torch 2"] and set(found["faster"]) == {"sm_90"}
    assert linear_table.table("text", [{"date": "2000-01-01"}])["faster"] == {}
