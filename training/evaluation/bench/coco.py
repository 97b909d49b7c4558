"""The 80 classes of COCO by the names that GenEval's prompts have for them."""

from __future__ import annotations

from collections.abc import Mapping

# In the order of COCO (Lin et al., arXiv 1405.0312), but three names that GenEval (github.com/djghosh13/geneval,
# evaluation/object_names.txt) has made plainer for prompts: computer mouse, tv remote and computer keyboard.
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
# Other labels of detectors: COCO's own of those three, and Pascal VOC's, which folders converted for transformers have.
_ALIASES = {
    "mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard",
    "motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "pottedplant": "potted plant",
    "diningtable": "dining table", "tvmonitor": "tv",
}  # fmt: skip


def class_names(labels: Mapping[int, str]) -> dict[int, str]:
    """GenEval's names by the numbers of a detector's classes; a number whose label is no class of COCO is left out.

    Raises:
        ValueError: a class of COCO has no label.
    """
    plain = {number: " ".join(label.lower().replace("_", " ").split()) for number, label in labels.items()}
    names = {number: _ALIASES.get(label, label) for number, label in plain.items()}
    found = {number: name for number, name in names.items() if name in CLASSES}
    if missing := [name for name in CLASSES if name not in found.values()]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"must have the 80 classes of COCO in id2label, got no {missing[0]}{more}")
    return found
