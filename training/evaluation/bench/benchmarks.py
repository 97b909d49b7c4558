"""The benchmarks by the names of the command, and what the report says of Qwen-Image."""

from __future__ import annotations

from qwen_image_fast.training.evaluation.bench import clip, edits, pictures, texts
from qwen_image_fast.training.evaluation.bench.items import Benchmark

_BOTH = ("en", "zh")

BENCHMARKS = {
    "geneval": Benchmark("GenEval", pictures.load_geneval, pictures.ask_geneval, pictures.score_geneval, 4,
                         ("detections", "chat")),
    "geneval2": Benchmark("GenEval 2", pictures.load_geneval2, pictures.ask_geneval2, pictures.score_geneval2),
    "dpg": Benchmark("DPG-Bench", pictures.load_dpg, pictures.ask_yes_no, pictures.score_dpg, 4),
    "oneig": Benchmark("OneIG", pictures.load_oneig, pictures.ask_oneig, pictures.score_oneig, 4, languages=_BOTH),
    "tiif": Benchmark("TIIF", pictures.load_tiif, pictures.ask_tiif, pictures.score_tiif),
    "cvtg": Benchmark("CVTG-2K", texts.load_cvtg, texts.ask_for_text, texts.score_cvtg, 1, ("reader", "chat"),
                      ask_clip=clip.ask_clip_score),
    "chinese-word": Benchmark("ChineseWord", texts.load_chinese_word, texts.ask_for_text, texts.score_chinese_word, 1,
                              ("reader", "chat"), ("zh",)),
    "long-text": Benchmark("LongText-Bench", texts.load_long_text, texts.ask_for_text, texts.score_long_text, 4,
                           ("chat", "reader"), _BOTH),
    "gedit": Benchmark("GEdit", edits.load_gedit, edits.ask_gedit, edits.score_gedit, languages=_BOTH),
    "imgedit": Benchmark("ImgEdit", edits.load_imgedit, edits.ask_imgedit, edits.score_imgedit),
}  # fmt: skip

# Of Qwen-Image in its technical report (arXiv 2508.02324, tables 3 to 11), by benchmark, language and row; and by whom
# the pictures were judged there, as far as it says.
PUBLISHED: dict[tuple[str, str], dict[str, float]] = {
    ("geneval", "en"): {"single_object": 0.99, "two_object": 0.92, "counting": 0.89, "colors": 0.88, "position": 0.76,
                        "color_attr": 0.77, "overall": 0.87},
    ("dpg", "en"): {"global": 91.32, "entity": 91.56, "attribute": 92.02, "relation": 94.31, "other": 92.73,
                    "overall": 88.32},
    ("oneig", "en"): {"alignment": 0.882, "text": 0.891},
    ("oneig", "zh"): {"alignment": 0.825, "text": 0.963},
    ("tiif", "en"): {"overall, short": 86.14, "overall, long": 86.83},
    ("cvtg", "en"): {"word accuracy, 2 regions": 0.8370, "word accuracy, 3 regions": 0.8364,
                     "word accuracy, 4 regions": 0.8313, "word accuracy, 5 regions": 0.8158, "word accuracy": 0.8288,
                     "NED": 0.9116, "CLIPScore": 0.8017},
    ("chinese-word", "zh"): {"level 1": 97.29, "level 2": 40.53, "level 3": 6.48, "overall": 58.30},
    ("long-text", "en"): {"overall": 0.943},
    ("long-text", "zh"): {"overall": 0.946},
    ("gedit", "en"): {"SC": 8.00, "PQ": 7.86, "overall": 7.56},
    ("gedit", "zh"): {"SC": 7.82, "PQ": 7.79, "overall": 7.52},
    ("imgedit", "en"): {"Add": 4.38, "Adjust": 4.16, "Extract": 3.43, "Replace": 4.66, "Remove": 4.14,
                        "Background": 4.38, "Style": 4.81, "Hybrid": 3.82, "Action": 4.69, "overall": 4.27},
}  # fmt: skip
PUBLISHED_JUDGE = {
    "geneval": "Mask2Former and CLIP", "geneval2": "", "dpg": "mPLUG", "oneig": "Qwen2.5-VL-7B", "tiif": "GPT-4o",
    "cvtg": "PaddleOCR and CLIP ViT-L/14", "chinese-word": "a judge not named", "long-text": "Qwen2.5-VL-7B",
    "gedit": "GPT-4.1", "imgedit": "GPT-4.1",
}  # fmt: skip
