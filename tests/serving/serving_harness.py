"""A tiny engine for tests: models, tasks of all kinds, the events that came, and pictures made alone."""

import io
import threading
import uuid

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

import qwen_image_fast as q
from qwen_image_fast.request import make
from qwen_image_fast.serving.adapters import Registered
from qwen_image_fast.serving.messages import Cancelled, Failed, Finished, Stepped, Task, WaveRan
from qwen_image_fast.tiny import tiny_configs

PROMPTS = ["a red circle on the left of a blue square", "the text \"OK\" in the center, on a green background",
           "a white triangle and a grey star above an orange circle, on a black background"]  # fmt: skip


def lora_file(path):
    """A LoRA of rank 4 on the first blocks of the tiny transformer and on its text encoder."""
    generator = torch.Generator().manual_seed(7)
    state = {}
    for name, width in (("transformer_blocks.0.attn.to_q", 192), ("transformer_blocks.1.img_mlp.net.2", 768)):
        state[f"transformer.{name}.lora_A.weight"] = torch.randn(4, width, generator=generator) * 0.1
        state[f"transformer.{name}.lora_B.weight"] = torch.randn(192, 4, generator=generator) * 0.1
    save_file(state, path)
    return path


class MODELS:
    """The tiny model, and pipelines of all classes around it."""

    def __init__(self, lora=None):
        self.pipe = q.QwenImageEditPlusPipeline.from_pretrained("tiny", torch_dtype=torch.float32)
        self.loras = Registered(self.pipe, {} if lora is None else {"style": str(lora)})
        self.made, self.nets = {}, {"union": control_net()}
        self.about = {}  # more of what an engine tells of itself

    def pipeline(self, request):
        name, net = request.pipeline(type(self.pipe).__name__), getattr(request, "net", None)
        if name not in self.made:
            more = {} if net is None else {"controlnet": self.nets[net]}
            self.made[name] = getattr(q, name).from_pipe(self.pipe, **more)
        return self.made[name]


def control_net():
    """A ControlNet of two blocks for the tiny transformer, whose residuals are not zero."""
    sizes = {k: v for k, v in tiny_configs()["transformer"].items() if k != "guidance_embeds"}
    torch.manual_seed(0)
    net = q.QwenImageControlNetModel(**{**sizes, "num_layers": 2, "extra_condition_channels": 0}).eval()
    for p in net.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.5 * p.shape[-1] ** -0.5)
    return net


class Collected:
    """The events of an engine; `last` has the one that ended each request."""

    def __init__(self):
        self.last, self.steps, self.waves = {}, [], []
        self.changed = threading.Condition()

    def __call__(self, event):
        with self.changed:
            if isinstance(event, (Finished, Failed, Cancelled)):
                assert event.id not in self.last, "answered twice"
                self.last[event.id] = event
            elif isinstance(event, Stepped):
                self.steps.append(event)
            elif isinstance(event, WaveRan):
                self.waves.append(event)
            self.changed.notify_all()

    def until(self, condition):
        with self.changed:
            assert self.changed.wait_for(condition, 120), "nothing came"

    def wait(self, ids):
        self.until(lambda: ids <= self.last.keys())


def picture(width, height, seed=0):
    image = Image.new("RGB", (width, height), (200, 220, 240))
    ImageDraw.Draw(image).ellipse((4 + seed % 7, 6, width // 2 + seed % 5, height - 8), fill=(200, 30 + seed % 50, 40))
    return image


def png(image):
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def task(prompt=PROMPTS[0], side=64, *, kind="text", opened=None, loras=None, previews=0, **values):
    opened = opened or {}
    places = {n: [{"path": "-"}] * len(v) if isinstance(v, list) else {"path": "-"} for n, v in opened.items()}
    sizes = {"width": side, "height": side} if kind == "text" else {}
    places |= {"net": "union"} if kind == "controlnet" else {}
    values = {"steps": 4, "seed": 0, "cfg": 1.0, "model": "tiny", **sizes, **values}
    request = make(kind, {"prompt": prompt, **places, **values})
    return Task(uuid.uuid4().hex, request, opened, loras or {}, previews=previews)


def some_tasks(count, chance):
    """Of every kind, each with its own size, steps, seed, guidance and LoRA."""
    found = []
    for k in range(count):
        kind = ("text", "text", "edit", "image_to_image", "inpaint", "edit")[k % 6]
        width, height = 16 * chance.randint(3, 7), 16 * chance.randint(3, 7)
        values = {"seed": chance.randrange(1000), "steps": chance.randint(2, 6), "cfg": chance.choice([1.0, 1.0, 3.0])}
        opened = {}
        if kind == "text":
            values |= {"width": width, "height": height, "images": chance.choice([1, 1, 2])}
            if k % 4 == 0:
                values |= {"lightning": 4, "cfg": 1.0}
                del values["steps"]
        elif kind == "edit":
            opened["image"] = [picture(width + j, height, k) for j in range(1 + (k % 12 == 2))]
        else:
            opened["image"] = picture(width, height, k)
            values |= {"strength": 0.7}
        if kind == "inpaint" or k % 12 == 5:
            mask = np.zeros((height, width), np.uint8)
            mask[: height // 2] = 255
            opened["mask"] = Image.fromarray(mask)
        loras = {"style": 0.5} if k % 5 == 3 else {}
        found.append(task(chance.choice(PROMPTS), kind=kind, opened=opened, loras=loras, **values))
    return found


def alone(models, t):
    """The pictures of one call of the pipeline."""
    from qwen_image_fast.schedulers import FlowMatchEulerDiscreteScheduler

    pipe = models.pipeline(t.request)
    usual = pipe.scheduler
    models.loras.activate(tuple(t.loras.items()), "transformer")
    if lightning := getattr(t.request, "lightning", None):
        pipe.use_schedule(f"lightning-{lightning}")
    images = pipe(**t.request.call(t.opened), progress=False).images
    pipe.scheduler = usual
    models.loras.activate((), "transformer")
    assert isinstance(usual, FlowMatchEulerDiscreteScheduler)
    return images
