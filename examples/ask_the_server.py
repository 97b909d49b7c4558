"""A picture by OpenAI's client, with previews, of `qwen-image-fast serve`: python examples/ask_the_server.py"""

import argparse
import base64
from pathlib import Path

from openai import OpenAI

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
parser.add_argument("--prompt", default='"HELLO" in red on a white ground')
parser.add_argument("--size", default="128x128", help="1328x1328 for the released models")
options = parser.parse_args()

client = OpenAI(base_url=options.url, api_key="none")
model = client.models.list().data[0].id
events = client.images.generate(
    model=model, prompt=options.prompt, size=options.size, stream=True, partial_images=2, extra_body={"seed": 1}
)
for event in events:
    done = event.type == "image_generation.completed"
    name = "answer.png" if done else f"preview-{event.partial_image_index}.png"
    Path(name).write_bytes(base64.b64decode(event.b64_json))
    print(name)
changed = client.images.edit(model=model, image=Path("answer.png"), prompt="make it blue", size=options.size)
Path("edited.png").write_bytes(base64.b64decode(changed.data[0].b64_json))
print("edited.png")
