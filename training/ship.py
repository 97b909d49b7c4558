"""A trained folder in 16 bits, as the package has it: `python -m qwen_image_fast.training.ship RUN/model OUT`.

With `--mean-only` behind it: for a VAE that was trained by its means alone, which must not draw noise. With `--before
FOLDER SHARE`: a share of the weights from before the last stage, which keeps what that stage would lose (averages of
weights before and after fine-tuning, arXiv 2109.01903).
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwen_image_fast.training.tasks.vae import without_deviation

LARGEST = 20_000_000


def ship(trained: Path, folder: Path, mean_only: bool = False, before: Path | None = None, share: float = 0.0) -> int:
    """Copy a diffusers-layout folder with all floating-point weights rounded to bfloat16; returns its bytes.

    `mean_only`: the VAE's weights go through `without_deviation`, as `VaeTask` exports those of its own. `before`: a
    folder of the same model, of whose weights a `share` is taken: (1 - share) trained + share before.

    Raises:
        FileExistsError: `folder` is there. ValueError: the result is larger than a package should carry, 20 MB; `share`
        is none; `before` is of another model.
    """
    if folder.exists():
        raise FileExistsError(f"ship: the folder {folder} is already there")
    if before is not None and not 0 < share < 1:
        raise ValueError(f"ship: share must be above 0 and below 1, got {share:g}")
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        shutil.copytree(trained, building, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
        for path in sorted(trained.rglob("*.safetensors")):
            tensors = _read(path)
            if before is not None:
                tensors = _averaged(tensors, _read(before / path.relative_to(trained)), share, path.parent.name)
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


def _read(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict


def _averaged(own: dict[str, Tensor], before: dict[str, Tensor], share: float, part: str) -> dict[str, Tensor]:
    if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in before.items()}:
        raise ValueError(f"ship: both folders must be of one model, got two of which the {part} differs")
    return {
        name: (1 - share) * tensor.float() + share * before[name].float() if tensor.is_floating_point() else tensor
        for name, tensor in own.items()
    }


if __name__ == "__main__":
    more = sys.argv[3:]
    at = more.index("--before") if "--before" in more else len(more)
    earlier = (Path(more[at + 1]), float(more[at + 2])) if at < len(more) else (None, 0.0)
    print(f"{ship(Path(sys.argv[1]), Path(sys.argv[2]), '--mean-only' in more, *earlier) / 1e6:.1f} MB")
