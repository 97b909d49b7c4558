"""Who judges: a vision-language model by an endpoint or in this process, a reader of text, a detector, or what one
left in a file."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qwen_image_fast.chat import Chat, ChatEndpoint, LocalChat
from qwen_image_fast.folders import nearest_file
from qwen_image_fast.training.evaluation.bench.answers import JudgeCall
from qwen_image_fast.training.evaluation.bench.items import Item, Question
from qwen_image_fast.training.evaluation.bench.model_folders import check_readable, config_of, folder_name

READER = "rapidocr"
_LONGEST = 2048  # tokens of an answer
_KINDS = {"chat": "a chat model", "reader": "a reader of texts", "detections": "a detector or a file of detections"}
_CHATS = ("ForConditionalGeneration", "ForCausalLM")  # ends of the names of models that answer in words


@dataclass(frozen=True)
class Judge:
    """A judge with the name that stands beside its scores.

    Attributes:
        kind: chat, reader, detections, or clip, which has no judgement but a cosine. colours: whether it names them.
    """

    name: str
    kind: str
    ask: JudgeCall
    colours: bool = True


def find_judge(
    given: str,
    model: str,
    kinds: Sequence[str],
    key_file: Path | None = None,
    timeout: float = 120.0,
    clip: Path | None = None,
) -> Judge:
    """`rapidocr`, an endpoint's address with a model's name there, a folder with a chat model or a detector, or a file
    of detections.

    Args:
        model: the name beside the scores; of a folder or a file its own, where it is empty.
        kinds: of judges that the benchmark knows. key_file: holds the endpoint's key.
        clip: folder of the CLIP that names the colours of what a detector finds.

    Raises:
        ValueError: it is none of them, or of another kind, or something is missing.
    """
    path = Path(given).expanduser()
    address = given.startswith(("http://", "https://"))
    kind = "reader" if given == READER else "chat" if address else "detections"
    if kind == "detections" and path.is_dir():
        kind = _kind_of_folder(path)
    elif kind == "detections" and not path.is_file():
        raise ValueError(
            f"evaluate bench: --judge must be {READER}, an address, a folder with a chat model or a detector, or a "
            f"file of detections; there is no file or folder {given}{nearest_file(path)}"
        )
    if kind not in kinds:
        allowed = " or ".join(_KINDS[one] for one in kinds)
        raise ValueError(f"evaluate bench: --judge must be {allowed}, got {_KINDS[kind]}")
    if key_file is not None and not address:
        raise ValueError(f"evaluate bench: --judge-key must be given with an address alone, got {given}")
    if clip is not None and (kind != "detections" or not path.is_dir()):
        raise ValueError(f"evaluate bench: --clip must be given with a detector's folder as --judge, got {given}")
    if kind == "reader":
        return Judge("RapidOCR", kind, read_by_ocr())
    if kind == "detections" and path.is_dir():
        return _detector(path, model, clip)
    if kind == "detections":
        return Judge(model or path.name, kind, found_in(path))
    if not address:
        return Judge(model or folder_name(path), kind, _in_this_process(path))
    if not model:
        raise ValueError("evaluate bench: --judge-model must be given with an address, its name stands by every score")
    key = None
    if key_file is not None:
        try:
            key = key_file.expanduser().read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ValueError(f"evaluate bench: --judge-key must be a file that holds it, got {key_file}") from error
    options = {"temperature": 0, "max_tokens": _LONGEST}
    return Judge(
        model, kind, seen_by(ChatEndpoint(given, model, api_key=key, timeout=timeout, options=options, who="judge"))
    )


def seen_by(chat: Chat) -> JudgeCall:
    """A judge that is shown the pictures of a question."""

    def ask(question: Question) -> str:
        pictures = []
        for path in question.pictures:
            with Image.open(path) as image:
                pictures.append(image.convert("RGB"))
        return chat(question.system, question.prompt, pictures)

    return ask


def read_by_ocr() -> JudgeCall:
    """RapidOCR: whatever is asked, the lines in the last picture of a question, from top to bottom."""
    from qwen_image_fast.training.evaluation.ocr import Reader

    reader, one_at_a_time = Reader(), threading.Lock()

    def ask(question: Question) -> str:
        with Image.open(question.pictures[-1]) as image, one_at_a_time:
            return "\n".join(line.text for line in reader.read(np.asarray(image.convert("RGB"))))

    return ask


def found_in(path: Path) -> JudgeCall:
    """A file of JSON lines {"picture": "<stem of its file>", "objects": [...]}, as a detector left them.

    Raises:
        ValueError: the file is none; when asked, of a picture that it does not have.
    """
    records: dict[str, Any] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        try:
            record = json.loads(line)
            records[record["picture"]] = record["objects"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'evaluate bench: line {number} of {path} must be JSON with "picture" and "objects"'
            ) from error

    def ask(question: Question) -> str:
        stem = question.pictures[-1].stem
        if stem not in records:
            raise LookupError(f"evaluate bench: {path} has no detections of {stem}")
        return json.dumps(records[stem])

    return ask


def find_clip(path: Path) -> Judge:
    """A CLIP whose answers are the cosines of pictures with the words of questions.

    Raises:
        ValueError: the folder has none.
    """
    from qwen_image_fast.training.evaluation.bench.clip import Clip

    clip, one_at_a_time = Clip(path), threading.Lock()

    def ask(question: Question) -> str:
        with Image.open(question.pictures[-1]) as image, one_at_a_time:
            (seen,), (said,) = clip.pictures([image.convert("RGB")]), clip.texts([question.prompt])
        return repr(float(seen @ said))

    return Judge(clip.name, "clip", ask)


def check_colours(judge: Judge, items: Sequence[Item]) -> None:
    """Before anything is drawn, that a judge can tell what the prompts ask for.

    Raises:
        ValueError: some ask for colours, and it is a detector without a CLIP.
    """
    from qwen_image_fast.training.evaluation.bench.detector import coloured

    asking = sum(bool(coloured(item.data)) for item in items)
    if asking and not judge.colours:
        raise ValueError(
            "evaluate bench: --clip must be given, the folder of a CLIP that names colours: a detector does not, and "
            f"{asking} of {len(items)} prompts ask for them"
        )


def _kind_of_folder(path: Path) -> str:
    from qwen_image_fast.training.evaluation.bench.detector import is_detector

    config = config_of(path, "--judge", "a folder with a vision-language model or a detector")
    names = config.get("architectures") or ()
    if is_detector(config):
        return "detections"
    if names and not any(name.endswith(_CHATS) for name in names):
        raise ValueError(
            "evaluate bench: --judge must be a folder with a vision-language model, or a Mask2Former, MaskFormer or "
            f"model for object detection of transformers, got {', '.join(names)} in {path}"
        )
    return "chat"


def _detector(path: Path, model: str, clip: Path | None) -> Judge:
    from qwen_image_fast.training.evaluation.bench.clip import Clip
    from qwen_image_fast.training.evaluation.bench.detector import Detector, found_by

    detector = Detector(path)
    name = model or detector.name
    if clip is None:
        return Judge(name, "detections", found_by(detector, None), colours=False)
    from qwen_image_fast.training.evaluation.bench.object_colours import ObjectColours

    colours = Clip(clip)
    return Judge(f"{name} and {colours.name}", "detections", found_by(detector, ObjectColours(colours)))


def _in_this_process(path: Path) -> JudgeCall:
    """A model of transformers, read when it is first asked: until then the memory is the model's that draws.

    Raises:
        ValueError: the folder has none that sees pictures; OSError, when first asked: its weights cannot be read.
    """
    processor = _processor(path)
    loaded: list[Chat] = []
    one_at_a_time = threading.Lock()

    def ask(system: str, prompt: str, pictures: Sequence[Image.Image] = ()) -> str:
        with one_at_a_time:
            if not loaded:
                loaded.append(_read_model(path, processor))
            return loaded[0](system, prompt, pictures)

    return seen_by(ask)


def _processor(path: Path) -> Any:
    """What prepares words and pictures for the vision-language model of a folder, before anything is drawn."""
    what = "a folder with a vision-language model of transformers"
    kind = config_of(path, "--judge", what).get("model_type")
    from transformers import AutoProcessor
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ValueError(f"evaluate bench: --judge must be {what}, which sees pictures, got {kind} in {path}")
    check_readable(path, "--judge")
    try:
        processor = AutoProcessor.from_pretrained(path)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"evaluate bench: what prepares words and pictures for --judge {path} cannot be read: {error}"
        ) from error
    if not getattr(processor, "tokenizer", None) or not getattr(processor, "chat_template", None):
        raise ValueError(
            f"evaluate bench: --judge must be {what} that can be talked to, {path} has no tokenizer or no chat template"
        )
    return processor


def _read_model(path: Path, processor: Any) -> Chat:
    from transformers import AutoModelForImageTextToText

    try:
        model = AutoModelForImageTextToText.from_pretrained(path, dtype="auto", use_safetensors=True)
    except (OSError, ValueError) as error:
        raise OSError(
            f"evaluate bench: there is no vision-language model of transformers in {path}: {error}"
        ) from error
    options = {"do_sample": False, "max_new_tokens": _LONGEST}
    return LocalChat(model, processor.tokenizer, processor, options=options, who="judge")
