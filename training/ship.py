"""A trained folder in 16 bits, as the package has it: `python -m qwen_image_fast.training.ship RUN/model OUT`.

With `--mean-only` behind it: for a VAE that was trained by its means alone, which must not draw noise.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qwen_image_fast.training.tasks.vae import without_deviation

LARGEST = 20_000_000


def ship(trained: Path, folder: Path, mean_only: bool = False) -> int:
    """Copy a diffusers-layout folder with all floating-point weights rounded to bfloat16; returns its bytes.

    `mean_only`: the VAE's weights go through `without_deviation`, as `VaeTask` exports those of its own.

    Raises:
        FileExistsError: `folder` is there. ValueError: the result is larger than a package should carry, 20 MB.
    """
    if folder.exists():
        raise FileExistsError(f"ship: the folder {folder} is already there")
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        shutil.copytree(trained, building, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
        for path in sorted(trained.rglob("*.safetensors")):
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
            if mean_only and path.parent.name == "vae":
                tensors = without_deviation(tensors)
            rounded = {n: t.to(torch.bfloat16) if t.is_floating_point() else t for n, t in tensors.items()}
            save_file(rounded, building / path.relative_to(trained), metadata={"format": "pt"})
        size = sum(path.stat().st_size for path in building.rglob("*") if path.is_file())
        if size > LARGEST:
            raise ValueError(f"ship: the folder must be at most {LARGEST / 1e6:.0f} MB, got {size / 1e6:.1f} MB")
        building.chmod(0o755)  # mkdtemp's folders are private
        building.replace(folder)  # fails where another process has filled the folder since
        return size
    finally:
        shutil.rmtree(building, ignore_errors=True)


if __name__ == "__main__":
    print(f"{ship(Path(sys.argv[1]), Path(sys.argv[2]), '--mean-only' in sys.argv[3:]) / 1e6:.1f} MB")
