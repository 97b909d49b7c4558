"""The gallery: what the shipped tiny model draws and edits while the pages are built."""

from __future__ import annotations

import io

from mkdocs.structure.files import File, Files

TEXTS = [
    '"HELLO" in red on a white ground', '"CANDLE" in blue on a yellow ground', '"42" in white on a black ground',
    '"River" in green on a white ground', "“你好”红色，白色背景", "“中国”黑色，黄色背景",
]  # fmt: skip
# The number of a text above and what is done to its picture.
EDITS = [(0, 'change the text "HELLO" to "WORLD"'), (1, "make it red"), (2, "make the background yellow"),
         (0, "remove the text")]  # fmt: skip


def on_files(files: Files, config) -> Files:
    import qwen_image_fast as q

    size = {"height": 128, "width": 128, "num_inference_steps": 20, "true_cfg_scale": 1.0, "progress": False}
    draw = q.QwenImagePipeline.from_pretrained("tiny")
    edit = q.QwenImageEditPlusPipeline.from_pretrained("tiny")
    lines = [
        "# Gallery",
        "",
        "Made by the tiny model that comes with the package (8 M parameters, 128 px), as these pages were built: the "
        "first seed each, nothing chosen. A picture is followed by the command that makes it.",
        "",
        '<div class="gallery" markdown>',
    ]
    made = []

    def show(image, sentence: str, command: str) -> None:
        data = io.BytesIO()
        image.save(data, "PNG")
        name = f"gallery/{len(made)}.png"
        made.append(File.generated(config, name, content=data.getvalue()))
        lines.extend(["", f"![{sentence}]({name})", f"`{command}`", ""])

    drawn = [draw(text, seed=1, **size).images[0] for text in TEXTS]
    for text, image in zip(TEXTS, drawn):
        show(image, text.replace('"', ""), f"qwen-image-fast generate '{text}' --model tiny -s 1")
    lines += ["</div>", "", "## Edits", "", '<div class="gallery" markdown>']
    for number, instruction in EDITS:
        image = edit(drawn[number], instruction, seed=1, **size).images[0]
        said = instruction.replace('"', "")
        show(image, said, f"qwen-image-fast edit '{instruction}' --image {number}.png --model tiny -s 1")
    lines += ["</div>", ""]
    for file in [*made, File.generated(config, "gallery.md", content="\n".join(lines))]:
        files.append(file)
    return files
