"""Scores of answers to tasks of vision: depth up to scale and shift, masks, edges, pictures."""

from __future__ import annotations

import numpy as np

from qwen_image_fast.training.evaluation.edit_checks import grown
from qwen_image_fast.training.synthesis.scenes import FAR, NEAR

SSIM_WINDOW = 11  # pixels of a side
_SSIM_SIGMA = 1.5
_SSIM_C1, _SSIM_C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def depth_scores(
    answer: np.ndarray,
    truth: np.ndarray,
    valid: np.ndarray,
    aligned_on: np.ndarray | None = None,
    limits: tuple[float, float] = (NEAR, FAR),
    inverse: bool = True,
) -> tuple[float, float]:
    """AbsRel, the mean of |d - d*| / d*, and δ1, the share with max(d / d*, d* / d) < 1.25, of affine-invariant depth.

    The answer a is aligned in the space that it is given in, as MiDaS (arXiv 1907.01341) does for inverse depth and
    Marigold (arXiv 2312.02145) for depth: with the scale s and the shift t that minimise the sum of squares of

    - inverse: s a + t - 1 / d*, and then d = 1 / (s a + t);
    - else:    s a + t - d*,     and then d = s a + t;

    and clipped to the limits. s may be negative: whether near is bright or dark makes no difference.

    Args:
        answer: [H, W]. truth: d*, [H, W]. valid: bool [H, W], which pixels count, where d* must be finite and above 0.
        aligned_on: those that s and t are found on; None: the same. limits: least and greatest d, 0 < least < greatest.
    """
    where = valid if aligned_on is None else aligned_on
    wanted = truth[where].astype(np.float64)
    basis = np.stack([answer[where], np.ones(wanted.size)], 1)
    scale, shift = np.linalg.lstsq(basis, 1 / wanted if inverse else wanted, rcond=None)[0]
    told, (least, greatest) = scale * answer[valid] + shift, limits
    depth = 1 / np.clip(told, 1 / greatest, 1 / least) if inverse else np.clip(told, least, greatest)
    right = truth[valid].astype(np.float64)
    ratio = np.maximum(depth / right, right / depth)
    return float(np.mean(np.abs(depth - right) / right)), float(np.mean(ratio < 1.25))


def intersection_over_union(made: np.ndarray, wanted: np.ndarray) -> float:
    """Of two masks; 1 where both are empty."""
    union = (made | wanted).sum()
    return float((made & wanted).sum() / union) if union else 1.0


def edge_f_score(made: np.ndarray, wanted: np.ndarray) -> float:
    """2 P R / (P + R): the share of what was made that is within a pixel of what is wanted, and the reverse."""
    if not made.any() or not wanted.any():
        return float(made.any() == wanted.any())
    precision = (made & grown(wanted, 1)).sum() / made.sum()
    recall = (wanted & grown(made, 1)).sum() / wanted.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def ssim(made: np.ndarray, wanted: np.ndarray) -> float:
    """The mean structural similarity of Wang et al. (IEEE TIP 13(4), 2004), over all whole windows and channels:
    (2 m n + C1)(2 c + C2) / ((m² + n² + C1)(v + w + C2)) with the means m, n, the variances v, w and the covariance c
    under a Gaussian of 11 x 11 pixels and σ 1.5, C1 = (0.01 · 255)², C2 = (0.03 · 255)².

    Args:
        made, wanted: uint8 [H, W, C] of the same shape, 11 pixels or more a side.
    """
    a, b = made.astype(np.float64), wanted.astype(np.float64)
    m, n = _smoothed(a), _smoothed(b)
    v, w, c = _smoothed(a * a) - m * m, _smoothed(b * b) - n * n, _smoothed(a * b) - m * n
    alike = (2 * m * n + _SSIM_C1) * (2 * c + _SSIM_C2)
    return float(np.mean(alike / ((m * m + n * n + _SSIM_C1) * (v + w + _SSIM_C2))))


def _smoothed(picture: np.ndarray) -> np.ndarray:
    """Under the window, at the places where all of it is in the picture."""
    weights = np.exp(-((np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2) ** 2) / (2 * _SSIM_SIGMA**2))
    weights /= weights.sum()
    for axis in (0, 1):
        length = picture.shape[axis] - SSIM_WINDOW + 1
        parts = (w * np.take(picture, range(i, i + length), axis) for i, w in enumerate(weights))
        picture = np.sum(list(parts), axis=0)
    return picture
