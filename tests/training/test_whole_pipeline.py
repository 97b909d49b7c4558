"""The example that runs everything, at its smaller size."""

import importlib.util
import json
from pathlib import Path

import pyarrow.parquet as pq
from trainer_helpers import log_of

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_from_pictures_to_a_scored_model(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    out = tmp_path / "out"
    on_ray = all(map(importlib.util.find_spec, ("ray", "pandas")))  # what Ray Data needs
    __import__("whole_pipeline").main(out, small=True, engine="ray" if on_ray else "local")
    audit = {row["origin"]: row["filter"] for row in pq.read_table(out / "filtered" / "audit.parquet").to_pylist()}
    found = {Path(name).stem: by for name, by in audit.items() if by}
    assert found == {"blurred": "clarity", "cut-off": "broken_file", "dark": "luma", "twice": "exact_duplicate"}
    assert "<html" in (out / "filtered" / "report.html").read_text(encoding="utf-8")
    kept = pq.read_table(out / "balanced" / "shards" / "index.parquet").to_pylist()
    assert {row["category"] for row in kept} == {"Nature", "Synthetic"}
    assert any(row["caption"].endswith("taken by day.") for row in kept)
    assert log_of(out / "run", "stage") == [0, 0, 1, 1]
    assert json.loads((out / "scores" / "results.json").read_text())["summary"]["en"]["pictures"] == 2
