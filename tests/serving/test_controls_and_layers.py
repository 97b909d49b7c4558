"""What only some models can do: ControlNets among other requests, and pictures taken apart into layers."""

import base64
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from http_harness import Running
from PIL import Image
from serving_harness import PROMPTS, Collected, alone, picture, png, task

import qwen_image_fast as q
from qwen_image_fast.pipelines import images, layered
from qwen_image_fast.serving.adapters import Registered
from qwen_image_fast.serving.engine import Engine
from qwen_image_fast.serving.messages import Finished
from qwen_image_fast.tiny import tiny_configs, write_untrained

QUICK = {"num_inference_steps": "3", "seed": "7"}


def opened(entry):
    image = Image.open(io.BytesIO(base64.b64decode(entry["b64_json"])))
    image.load()
    return image


def test_controlled_pictures_among_others(models):
    seen = Collected()
    running = Engine(models.pipe, seen, pipelines=models.pipeline, loras=models.loras)
    running.start()
    controlled = [
        task(PROMPTS[k % 3], kind="controlnet", opened={"control": [picture(64 + 16 * k, 64, k)]}, seed=k,
             cfg=3.0 if k == 1 else 1.0, images=1 + (k == 2), scale=0.8)
        for k in range(3)
    ]  # fmt: skip
    several = task(PROMPTS[0], kind="controlnet", opened={"control": [picture(64, 64), picture(64, 64, 3)]}, seed=5)
    tasks = [*controlled, several, task(PROMPTS[0], seed=1), task(PROMPTS[1], 96, seed=2, loras={"style": 0.5})]
    for t in tasks:
        running.submit(t)
    seen.wait({t.id for t in tasks})
    running.end()
    for t in tasks:
        assert isinstance(seen.last[t.id], Finished), seen.last[t.id]
        expected = [np.asarray(image) for image in alone(models, t)]
        assert all(np.array_equal(i, e) for (i,), e in zip(seen.last[t.id].images, expected, strict=True)), t.request
    plain = alone(models, task(controlled[0].request.prompt, 64, seed=0))[0]
    assert not np.array_equal(plain, seen.last[controlled[0].id].images[0][0])  # the control did something


def test_controls_over_http(running, models):
    control = picture(64, 80)
    form = {"prompt": PROMPTS[0], "controlnet": "union", "control_scale": "0.7", **QUICK}
    answer = running.http.post("/v1/images/edits", files={"image": png(control)}, data=form).json()
    t = task(PROMPTS[0], kind="controlnet", opened={"control": [control]}, scale=0.7, steps=3, seed=7)
    assert np.array_equal(opened(answer["data"][0]), alone(models, t)[0])
    assert running.http.get("/v1/models").json()["about"]["controlnets"] == ["union"]


@pytest.mark.parametrize("form, status, code, param", [
    ({"controlnet": "/etc/passwd"}, 404, "controlnet_not_found", "controlnet"),
    ({"control_scale": "1"}, 400, "invalid_value", "control_scale"),
    ({"controlnet": "union", "control_scale": "11"}, 400, "invalid_value", "control_scale"),
    ({"controlnet": "union", "size": "70x70"}, 400, "invalid_size", "size"),
])  # fmt: skip
def test_bad_controls(running, form, status, code, param):
    answer = running.http.post("/v1/images/edits", files={"image": png(picture(64, 64))}, data={"prompt": "x", **form})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param), error


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    """A server of a Layered model, whose pictures are 64 times smaller than the released one's."""
    patch = pytest.MonkeyPatch()
    patch.setattr(layered, "area_size", lambda area, w, h: images.area_size(area / 64, w, h))
    folder = tmp_path_factory.mktemp("layered") / "model"
    write_untrained(folder, edit=True)
    torch.manual_seed(0)
    configs = tiny_configs()
    flags = {"use_additional_t_cond": True, "use_layer3d_rope": True, "num_layers": 2}
    pipe = q.QwenImageLayeredPipeline.from_pretrained(
        folder, torch_dtype=torch.float32,
        transformer=q.QwenImageTransformer2DModel(**{**configs["transformer"], **flags}).eval(),
        vae=q.AutoencoderKLQwenImage(**{**configs["vae"], "input_channels": 4}).eval(),
    )  # fmt: skip
    models = SimpleNamespace(pipe=pipe, loras=Registered(pipe, {}), nets={}, about={}, pipeline=lambda request: pipe)
    server = Running(models)
    yield server, models
    server.end()
    patch.undo()


def test_layers_over_http(layers):
    server, models = layers
    form = {"prompt": "a circle", "layers": "3", "resolution": "640", **QUICK}
    answer = server.http.post("/v1/images/edits", files={"image": png(picture(96, 64))}, data=form).json()
    entries = answer["data"]
    t = task("a circle", kind="layers", opened={"image": picture(96, 64).convert("RGBA")}, count=3, steps=3, seed=7)
    (expected,) = models.pipe(**t.request.call(t.opened), progress=False).images
    assert [entry["layer"] for entry in entries] == [1, 2, 3] and len(expected) == 3
    for entry, image in zip(entries, expected, strict=True):
        made = opened(entry)
        assert made.mode == "RGBA" and np.array_equal(made, image)
    assert answer["background"] == "transparent" and len({entry["b64_json"] for entry in entries}) == 3


@pytest.mark.parametrize("form, param", [
    ({"size": "64x64"}, "size"), ({"n": "2"}, "n"), ({"layers": "0"}, "layers"), ({"resolution": "100"}, "resolution"),
    ({"output_format": "jpeg"}, "output_format"), ({"strength": "0.5"}, "strength"),
])  # fmt: skip
def test_bad_layers(layers, form, param):
    answer = layers[0].http.post("/v1/images/edits", files={"image": png(picture(64, 64))},
                                 data={"prompt": "x", "layers": "2", **form})  # fmt: skip
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


def test_layers_need_a_layered_model(running):
    answer = running.http.post("/v1/images/edits", files={"image": png(picture(64, 64))},
                               data={"prompt": "x", "layers": "2"})  # fmt: skip
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "layers", answer.text
