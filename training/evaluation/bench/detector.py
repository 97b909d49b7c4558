"""A detector of transformers that knows COCO's classes: GenEval's own judge.

GenEval (github.com/djghosh13/geneval, evaluation/evaluate_images.py) asks mmdetection's Mask2Former with Swin-S, which
has learnt COCO's instances. Kept from there: an object for each class of each query, of which the 100 surest count; its
score is the class's probability times the mean probability of its mask where that is above half (Cheng et al., arXiv
2112.01527); masks at the picture's size, from logits that are resized before they are cut at 0; the box around the
mask; no suppression of boxes that overlap, which GenEval has off (max_overlap 1). What counts for a prompt is in
`detections.py`.

What differs: the weights, which transformers' folders have from the paper's authors, not from mmdetection; pictures as
the folder's own preprocessor resizes them; float32. A detector of boxes (DETR and its relatives) may stand in: its
objects have no masks, and their colours are seen with what is behind them, as GenEval does without masks.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from qwen_image_fast.training.evaluation.bench.answers import JudgeCall
from qwen_image_fast.training.evaluation.bench.coco import class_names
from qwen_image_fast.training.evaluation.bench.detections import LEAST, kept
from qwen_image_fast.training.evaluation.bench.items import Question
from qwen_image_fast.training.evaluation.bench.model_folders import (
    check_readable,
    config_of,
    folder_name,
    read_on_device,
)

if TYPE_CHECKING:
    import torch

    from qwen_image_fast.training.evaluation.bench.object_colours import Found, ObjectColours

_WHAT = (
    "a folder with a Mask2Former, MaskFormer or model for object detection of transformers that knows COCO's classes"
)
_MASKS = ("Mask2FormerForUniversalSegmentation", "MaskFormerForInstanceSegmentation")
_BOXES = "ForObjectDetection"  # the end of the names of all of transformers' models that answer with boxes
_MOST = 100  # objects of a picture


def is_detector(config: Mapping[str, Any]) -> bool:
    """By the architectures of a config.json."""
    return any(name in _MASKS or name.endswith(_BOXES) for name in config.get("architectures") or ())


class Detector:
    """The detector of a folder, read when it is first asked, in float32, on the GPU where there is one.

    Raises:
        ValueError: the folder has none, or one of other classes, or pickles. OSError, when first asked: it cannot be
            read. ImportError: it has masks, and scipy is missing.
    """

    def __init__(self, path: Path) -> None:
        path = path.expanduser()
        config = config_of(path, "--judge", _WHAT)
        if not is_detector(config):
            raise ValueError(f"evaluate bench: --judge must be {_WHAT}, got {config.get('architectures')} in {path}")
        labels = config.get("id2label") or {}
        try:
            self._classes = class_names({int(number): str(label) for number, label in labels.items()})
        except ValueError as error:
            raise ValueError(f"evaluate bench: the detector of --judge {error}, in {path}") from error
        check_readable(path, "--judge")
        self._masks = not config["architectures"][0].endswith(_BOXES)
        if self._masks:
            try:
                import scipy  # noqa: F401  transformers asks for it where it builds the model
            except ImportError as error:
                raise ImportError("evaluate bench: a detector with masks needs scipy: pip install scipy") from error
        self.name = folder_name(path)
        self._path = path
        self._parts: tuple[Any, Any] | None = None
        self._one_at_a_time = threading.Lock()

    def __call__(self, picture: Image.Image) -> list[Found]:
        """The objects with scores above GenEval's least, the surest first."""
        import torch

        model, processor = self._loaded()
        picture = picture.convert("RGB")
        inputs = processor(images=picture, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            output = model(**inputs)
        size = picture.height, picture.width
        if not self._masks:
            return self._from_boxes(processor, output, size)
        seen = inputs.get("pixel_mask")
        shape = inputs["pixel_values"].shape[-2:]
        inside = shape if seen is None else (int(seen[0].any(1).sum()), int(seen[0].any(0).sum()))
        logits = torch.nn.functional.interpolate(output.masks_queries_logits.float(), shape, mode="bilinear")
        logits = logits[..., : inside[0], : inside[1]]
        return self._from_queries(output.class_queries_logits[0].float(), logits[0], size)

    def _from_queries(self, classes: torch.Tensor, masks: torch.Tensor, size: tuple[int, int]) -> list[Found]:
        """Of logits [queries, classes and none] and [queries, h, w]."""
        import torch

        from qwen_image_fast.training.evaluation.bench.object_colours import Found

        probabilities = classes.softmax(-1)[:, :-1]
        surest = probabilities.flatten().topk(min(_MOST, probabilities.numel()))
        found = []
        for probability, place in zip(surest.values.tolist(), surest.indices.tolist()):
            query, number = divmod(place, probabilities.shape[1])
            if probability <= LEAST or number not in self._classes:  # a mask's probability is at most 1
                continue
            logits = torch.nn.functional.interpolate(masks[query][None, None], size, mode="bilinear")[0, 0]
            mask = logits > 0
            if not mask.any():
                continue
            score = probability * float(logits[mask].sigmoid().mean())
            if score > LEAST:
                across, down = (torch.nonzero(mask.any(axis)).flatten().tolist() for axis in (0, 1))
                box = float(across[0]), float(down[0]), across[-1] + 1.0, down[-1] + 1.0
                found.append(Found(self._classes[number], score, box, mask.cpu().numpy()))
        return sorted(found, key=lambda one: -one.score)

    def _from_boxes(self, processor: Any, output: Any, size: tuple[int, int]) -> list[Found]:
        from qwen_image_fast.training.evaluation.bench.object_colours import Found

        (found,) = processor.post_process_object_detection(output, threshold=LEAST, target_sizes=[size])
        height, width = size
        objects = []
        for score, number, corners in zip(found["scores"].tolist(), found["labels"].tolist(), found["boxes"].tolist()):
            if number in self._classes:
                left, top, right, bottom = corners
                box = max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))
                objects.append(Found(self._classes[number], score, box))
        return sorted(objects, key=lambda one: -one.score)

    def _loaded(self) -> tuple[Any, Any]:
        with self._one_at_a_time:
            if self._parts is None:
                import transformers

                masks = transformers.AutoModelForUniversalSegmentation
                kind = masks if self._masks else transformers.AutoModelForObjectDetection
                self._parts = read_on_device(self._path, "detector", kind, transformers.AutoImageProcessor)
            return self._parts


def found_by(detector: Detector, colours: ObjectColours | None) -> JudgeCall:
    """GenEval's judge: the objects of a question's last picture as JSON, those whose colours the prompt asks for (of a
    class the surest, as many as it asks for) with their colours. LookupError where it asks for one and `colours` is
    None."""

    one_at_a_time = threading.Lock()

    def ask(question: Question) -> str:
        with Image.open(question.pictures[-1]) as image, one_at_a_time:
            return json.dumps(objects_in(image.convert("RGB"), question))

    def objects_in(picture: Image.Image, question: Question) -> list[dict[str, Any]]:
        found = detector(picture)
        told: list[dict[str, Any]] = [{"class": one.name, "score": one.score, "box": [*one.box]} for one in found]
        counting = kept(question.data.get("tag", ""), [{**one, "number": i} for i, one in enumerate(told)])
        for asked in coloured(question.data):
            if colours is None:
                raise LookupError(f"evaluate bench: {question.key} asks for colours, which need a CLIP")
            numbers = [one["number"] for one in counting.get(asked["class"], [])[: asked["count"]]]
            for number, colour in zip(numbers, colours(picture, [found[i] for i in numbers])):
                told[number]["color"] = colour
        return told

    return ask


def coloured(wanted: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Of the metadata of a prompt the objects that must have a colour."""
    return [one for one in wanted.get("include", ()) if one.get("color")]
