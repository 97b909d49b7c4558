"""Prompt enhancement against a stub of an OpenAI-compatible server, and a local model."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from PIL import Image

from qwen_image_fast import QwenImageEditPlusPipeline, QwenImagePipeline
from qwen_image_fast.pipelines.prompt_enhancer import POLISH, REWRITE, LocalEnhancer, OpenAIEnhancer
from qwen_image_fast.tiny import tiny_tokenizer, write_untrained


class Stub(BaseHTTPRequestHandler):
    answer: object = "a cat in the sun"
    status = 200
    seen: list = []  # noqa: RUF012
    release = None

    def do_POST(self):
        if self.release is not None:
            self.release.wait(30)
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.path, self.headers.get("Authorization"), body))
        self.send_response(self.status)
        self.end_headers()
        content = self.answer if isinstance(self.answer, bytes) else json.dumps(
            {"choices": [{"message": {"role": "assistant", "content": self.answer}}]}
        ).encode()  # fmt: skip
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    handler = type("Handler", (Stub,), {"seen": []})
    http = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    handler.url = f"http://127.0.0.1:{http.server_port}/v1"
    yield handler
    http.shutdown()
    http.server_close()


CALL = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent", "seed": 0, "progress": False}


def test_text_to_image(server, tiny_folder):
    pipe = QwenImagePipeline.from_pretrained(tiny_folder)
    expected = pipe("a cat in the sun", **CALL).images
    plain = pipe("cat", **CALL)
    pipe.prompt_enhancer = OpenAIEnhancer(server.url + "/", "some-model", api_key="secret", temperature=0.2)
    out = pipe("cat", negative_prompt=None, **CALL)
    assert torch.equal(out.images, expected) and not torch.equal(out.images, plain.images)
    assert (plain.prompts, out.prompts) == (["cat"], ["a cat in the sun"])
    ((path, key, body),) = server.seen
    assert path == "/v1/chat/completions" and key == "Bearer secret"
    assert body["model"] == "some-model" and body["temperature"] == 0.2
    assert body["messages"] == [{"role": "system", "content": REWRITE}, {"role": "user", "content": "cat"}]


def test_edits_show_their_pictures(server, tmp_path):
    write_untrained(tmp_path / "edit", edit=True)
    pipe = QwenImageEditPlusPipeline.from_pretrained(tmp_path / "edit")
    pipe.prompt_enhancer = OpenAIEnhancer(server.url, "m")
    images = [Image.new("RGB", (32, 48), "red"), Image.new("RGB", (16, 16), "blue")]
    out = pipe([images, []], ["swap", "a cat"], negative_prompt=" ", **CALL)
    assert out.prompts == ["a cat in the sun"] * 2
    first, second = (body["messages"] for _, _, body in server.seen)  # the negative prompt is not enhanced
    assert first[0]["content"] == POLISH and second[0]["content"] == REWRITE and second[1]["content"] == "a cat"
    *shown, text = first[1]["content"]
    assert text == {"type": "text", "text": "swap"} and len(shown) == 2
    data = base64.b64decode(shown[0]["image_url"]["url"].removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(data)).tobytes() == images[0].tobytes()


def test_a_photograph_is_sent_smaller(server):
    OpenAIEnhancer(server.url, "m")("brighter", [Image.new("RGB", (4000, 3000))])
    shown = server.seen[0][2]["messages"][1]["content"][0]["image_url"]["url"]
    assert Image.open(io.BytesIO(base64.b64decode(shown.partition(",")[2]))).size == (1184, 896)


def test_what_the_server_may_do_wrong(server):
    enhance = OpenAIEnhancer(server.url, "m")
    for answer, text in ((b"no json", "must answer with a chat completion"), (b"[]", "must answer with a chat"),
                         ("  ", "the answer must be a text, got '  '"), (None, "got None")):  # fmt: skip
        server.answer = answer
        with pytest.raises(ValueError, match=text):
            enhance("cat")
    for server.status in (500, 503):
        with pytest.raises(ConnectionError, match=f"could not answer: HTTP Error {server.status}"):
            enhance("cat")
    with pytest.raises(ConnectionError, match="could not answer"):
        OpenAIEnhancer("http://127.0.0.1:1/v1", "m", timeout=1)("cat")
    with pytest.raises(ValueError, match="base_url must begin with http"):
        OpenAIEnhancer("localhost:8000", "m")


def test_a_server_that_hangs(server):
    server.release = threading.Event()
    try:
        with pytest.raises(ConnectionError, match="could not answer: timed out"):
            OpenAIEnhancer(server.url, "m", timeout=0.2)("cat")
    finally:
        server.release.set()


@pytest.mark.parametrize("answer", [None, "", " \n", 3, ["a cat"]])
def test_an_enhancer_of_your_own_must_return_a_text(tiny_folder, answer):
    pipe = QwenImagePipeline.from_pretrained(tiny_folder)
    pipe.prompt_enhancer = lambda prompt, pictures: answer
    with pytest.raises(ValueError, match="prompt_enhancer: the answer must be a text, got "):
        pipe("cat", **CALL)


def test_a_local_model(tiny_folder):
    from qwen_image_fast.models.text_encoder import load_captioner

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n"
    )
    model = load_captioner(tiny_folder / "text_encoder")
    enhance = LocalEnhancer(model, tokenizer, max_new_tokens=6)
    answer = enhance("cat")
    assert answer and answer == enhance("cat")
