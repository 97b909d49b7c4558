"""Pictures of one colour in every kind of source."""

import base64
import csv
import io
import json

from PIL import Image

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (90, 90, 90)]


def picture(colour, size=(32, 32)):
    return Image.new("RGB", size, colour)


def as_bytes(colour):
    file = io.BytesIO()
    picture(colour).save(file, "PNG")
    return file.getvalue()


def colours_of(source, count, method="sample"):
    """Caption and colour of so many samples."""
    made = [getattr(source, method)(0, i) for i in range(count)]
    return {sample.caption: tuple(sample.image[0, 0].tolist()) for sample in made}


def files(root, names, colours=COLOURS):
    """A file of each name: its text, or where that is a number the picture of that colour."""
    for name, content in names.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, int):
            picture(colours[content]).save(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def write_table(folder, suffix, as_paths):
    rows = []
    for i, colour in enumerate(COLOURS[:3]):
        picture(colour).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png" if as_paths else as_bytes(colour), "caption": f"colour {i}"})
    path = folder / f"table{suffix}"
    if suffix == ".jsonl":
        if not as_paths:
            rows = [{"image_base64": base64.b64encode(r["image"]).decode(), "caption": r["caption"]} for r in rows]
        path.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    elif suffix == ".csv":
        with open(path, "w", newline="") as file:
            table = csv.DictWriter(file, ["image", "caption"])
            table.writeheader()
            table.writerows(rows)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


def write_pairs(root, layout):
    root.mkdir(exist_ok=True)
    names = {}
    for i, colour in enumerate(COLOURS[:3]):
        before, after = f"p{i}.before.png", f"p{i}.after.jpg"
        if layout == "folders":
            before, after = f"before/p{i}.png", f"after/p{i}.png"
        for name, made in ((before, picture((9, 9, 9), (48, 32))), (after, picture(colour))):
            (root / name).parent.mkdir(exist_ok=True)
            made.save(root / name, quality=100, subsampling=0)
        names[i] = before, after
        if layout != "table":
            (root / f"p{i}.txt").write_text(f"colour {i}\n", encoding="utf-8")
    if layout == "table":
        rows = [{"image": a, "references": [b, b], "instruction": f"colour {i}"} for i, (b, a) in names.items()]
        (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root
