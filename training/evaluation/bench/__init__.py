"""Public benchmarks: draw, judge, score; `qwen-image-fast evaluate bench`.

`items.py` what is asked for, `files.py` reading prompts, `pictures.py`, `texts.py` and `edits.py` the protocols,
`metrics.py` and `detections.py` their exact metrics, `benchmarks.py` their list and the report's numbers,
`judges.py` who answers, `detector.py`, `object_colours.py` and `clip.py` models that see without words, `coco.py` what
a detector knows, `model_folders.py` whether a folder can be read, `reading.py` what an answer means, `answers.py`
answers on disk, `run.py` the stages.
"""
