"""Sizes of pictures that are drawn, checked before anything is loaded."""

from __future__ import annotations

import typer


def check_size(size: int | None) -> int | None:
    """A side in pixels; typer.BadParameter where it is no multiple of 16, as sides of latent tokens are; None stays."""
    if size is not None and size % 16:
        near = max(32, round(size / 16) * 16)
        raise typer.BadParameter(f"--size must be a multiple of 16 pixels, got {size}; {near} would do")
    return size
