"""The security checklist, a test for each line: who may ask, what may come in, what never leaves."""

import base64
import io
import json
import socket
import struct
import time
import zlib

import httpx
import openai
import pytest
from http_harness import Running
from PIL import Image
from serving_harness import picture, png
from typer.testing import CliRunner

from qwen_image_fast.cli import app
from qwen_image_fast.serving import fetch, logs
from qwen_image_fast.serving.errors import ApiError
from qwen_image_fast.serving.settings import ApiKey, Settings, read_keys

BODY = {"prompt": "a red circle on a blue square", "size": "64x64", "num_inference_steps": 2}
KEY, OTHER = "a-key-of-the-studio", "another-key-of-someone"


@pytest.fixture(scope="module")
def guarded(models):
    keys = [ApiKey(name="studio", key=KEY, priority=1), ApiKey(name="someone", key=OTHER, per_minute=2)]
    limits = {"json_bytes": 100_000, "form_bytes": 300_000, "file_bytes": 200_000, "fields": 8, "pixels_in": 250_000}
    server = Running(models, keys=keys, limits=limits, origins=["https://page.example"], url_hosts=["pictures.example"])
    yield server
    server.end()


def asked(server, path="/v1/images/generations", key=KEY, **options):
    headers = {**({"authorization": f"Bearer {key}"} if key else {}), **options.pop("headers", {})}
    if not options.keys() & {"content", "files", "data"}:
        options.setdefault("json", BODY)
    return server.http.post(path, headers=headers, **options)


# 1. Loopback by default, other machines only with keys.


@pytest.mark.parametrize("args, sentence", [
    ("--host 0.0.0.0", "--host 0.0.0.0 lets other machines in: give --api-key-file, or --insecure"),
    ("--host ::", "--host :: lets other machines in"),
    ("--cors-origin page", "--cors-origin must be like https://example.com, got page"),
    ("--api-key-file nowhere.json", "there is no file nowhere.json"),
    ("--threads 99999", "--threads must be at most "),
    (f"--keep-in {__file__}", "--keep-in must be a folder, got the file"),
    ("--keep-in /proc/nowhere", "--keep-in /proc/nowhere cannot be written"),
    ("--name tiny", "--name must be another name of the model, given once, got tiny"),
    ("--name a --name a", "--name must be another name of the model, given once, got a"),
    ("--host 999.1.1.1 --insecure", "--host 999.1.1.1 is neither an address nor a name that is known here"),
    ("--lora style=", "a LoRA must be NAME=FILE, got style="),
    ("--parallel foo", "--parallel"),
    ("--lora style=/nowhere.safetensors", "there is no LoRA file /nowhere.safetensors"),
])  # fmt: skip
def test_what_the_command_refuses(args, sentence):
    result = CliRunner().invoke(app, ["serve", "--model", "tiny", *args.split()])
    said = result.stderr.removeprefix("tiny: loading the server\n")  # where it refuses what it reads without that
    assert result.exit_code == 2 and said.startswith(f"error: {sentence}"), result.output


def test_it_listens_on_the_loopback():
    assert Settings.model_fields["host"].default == "127.0.0.1"


# 2. Keys.


def test_keys(guarded):
    for key in (None, "wrong", KEY[:-1], KEY + "x"):
        answer = asked(guarded, key=key)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["type"] == "authentication_error"
    assert asked(guarded).status_code == 200
    assert guarded.http.get("/health").status_code == 200 and guarded.http.get("/metrics").status_code == 401
    with pytest.raises(openai.AuthenticationError):
        guarded.client("no key of it").images.generate(prompt="x")


def test_keys_have_limits(guarded):
    assert asked(guarded, json={**BODY, "priority": 1}).status_code == 200
    answer = asked(guarded, json={**BODY, "priority": 2})
    assert answer.status_code == 403 and answer.json()["error"]["param"] == "priority"
    found = [asked(guarded, key=OTHER, json={}).status_code for _ in range(3)]
    assert found == [400, 400, 429]


def test_a_job_is_its_owners(guarded):
    shown = asked(guarded, headers={"prefer": "respond-async"}).json()
    for method in ("GET", "DELETE"):
        other = guarded.http.request(method, shown["poll_url"], headers={"authorization": f"Bearer {OTHER}"})
        assert other.status_code == 404
    own = guarded.http.get(shown["poll_url"], headers={"authorization": f"Bearer {KEY}"})
    assert own.json()["id"] == shown["id"] and len(shown["id"]) == 4 + 32


@pytest.mark.parametrize("text, sentence", [
    ("{", "must hold a JSON list"), ("[]", "must hold a JSON list"), ('{"name": "x"}', "must hold a JSON list"),
    ('[{"name": "x", "key": "short"}]', "a key's key"), ('[{"name": "x", "key": "1234567890123456", "x": 1}]', "x"),
    (json.dumps([{"name": "x", "key": "1234567890123456"}] * 2), "every name must be there once"),
])  # fmt: skip
def test_files_of_keys(text, sentence, tmp_path):
    (tmp_path / "keys.json").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_keys(tmp_path / "keys.json")


# 3. Bodies, parts and headers.


def test_bodies_are_limited_before_they_are_read(guarded):
    long = json.dumps({**BODY, "prompt": "x" * 200_000}).encode()
    kind = {"content-type": "application/json"}
    assert asked(guarded, content=long, headers=kind).status_code == 413
    assert asked(guarded, content=iter([long[:90_000], long[90_000:]]), headers=kind).status_code == 413


def test_forms_are_limited(guarded):
    small = png(picture(32, 32))
    many = [("image[]", ("a.png", small, "image/png"))] * 18
    eighteen = asked(guarded, "/v1/images/edits", files=many, data={"prompt": "x"})
    assert eighteen.status_code == 413 and "16 pictures and a mask" in eighteen.json()["error"]["message"]
    seventeen = asked(guarded, "/v1/images/edits", files=many[:17], data={"prompt": "x"})
    assert seventeen.status_code == 400 and "16 times at most" in seventeen.json()["error"]["message"]
    fields = {f"f{k}": "x" for k in range(20)}
    assert asked(guarded, "/v1/images/edits", files=many[:1], data=fields).status_code == 413
    large = asked(guarded, "/v1/images/edits", files=[("image", ("a.png", b"x" * 250_000))], data={"prompt": "x"})
    assert large.status_code == 413 and large.json()["error"]["code"] == "too_large"
    body = asked(guarded, "/v1/images/edits", files=[("image", ("a.png", b"x" * 400_000))], data={"prompt": "x"})
    assert body.status_code == 413
    broken = {"content-type": "multipart/form-data; boundary=x"}
    assert asked(guarded, "/v1/images/edits", content=b"--y\r\nnonsense", headers=broken).status_code == 400


def test_a_body_that_breaks_off_is_no_fault_of_the_server(running, caplog):
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1:{running.port}\r\n"
    gone = 'endpoint="/v1/images/generations",status="499"'
    before = gone in running.http.get("/metrics").text
    with socket.create_connection(("127.0.0.1", running.port)) as client:
        client.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{{".encode())
    until = time.monotonic() + 60
    while not before and gone not in running.http.get("/metrics").text:
        assert time.monotonic() < until
    assert "a request failed" not in caplog.text


def test_an_address_with_a_slash_too_many_is_not_there(running):
    answer = running.http.post("/v1/images/generations/", json={"prompt": "x"})
    assert answer.status_code == 404 and answer.json()["error"]["type"] == "invalid_request_error"


def test_long_headers_are_refused(guarded):
    with socket.create_connection(("127.0.0.1", guarded.port)) as s:
        s.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 200_000 + b"\r\n\r\n")
        text = s.recv(4096).decode()  # one piece; what it did not read makes the system break the connection off
    head, _, body = text.partition("\r\n\r\n")
    assert (
        head.startswith("HTTP/1.1 400 ") and "content-type: application/json" in head and "x-request-id: req_" in head
    )
    assert json.loads(body)["error"] | {"message": ""} == {
        "message": "", "type": "invalid_request_error", "param": None, "code": "invalid_http"
    }  # fmt: skip
    assert guarded.http.get("/health").status_code == 200


# 4. Pictures.


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width, height, *more):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * ((width * 3 + 1) * height if width < 100 else 10)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(more) + pixels + chunk(b"IEND", b"")


def animated():
    file = io.BytesIO()
    picture(32, 32).save(file, format="WEBP", save_all=True, append_images=[picture(32, 32, 5)])
    return file.getvalue()


def saved(kind, **options):
    file = io.BytesIO()
    picture(32, 32).save(file, format=kind, **options)
    return file.getvalue()


BOMB = chunk(b"iTXt", b"x\0\1\0\0\0" + zlib.compress(b"\0" * 50_000_000, 9))


@pytest.mark.parametrize("content, status, sentence", [
    (png_of(60_000, 60_000), 413, "image[0] must have at most 250000 pixels"),
    (png_of(32, 32, BOMB), 400, "image[0] could not be read as a picture"),
    (animated(), 400, "image[0] could not be read as a picture: it has 2 frames"),
    (saved("GIF"), 400, "image[0] must be a PNG, JPEG or WebP"),
    (saved("TIFF"), 400, "image[0] must be a PNG, JPEG or WebP"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 400, "image[0] must be a PNG, JPEG or WebP"),
    (saved("PNG")[:60], 400, "image[0] could not be read"),
    (b"", 400, "image[0] must be a PNG"),
])  # fmt: skip
def test_pictures_that_are_refused(guarded, content, status, sentence):
    answer = asked(guarded, "/v1/images/edits", files=[("image", ("/etc/passwd", content))], data={"prompt": "x"})
    assert answer.status_code == status and answer.json()["error"]["message"].startswith(sentence), answer.text


def test_only_pixels_are_kept(guarded):
    """No EXIF entry, no text, no name of a file reaches the result."""
    exif = Image.Exif()
    exif[0x010E] = "where I live"
    content = saved("JPEG", exif=exif, comment=b"a secret")
    form = {"prompt": "x" * 20, "num_inference_steps": "2", "true_cfg_scale": "1"}
    answer = asked(guarded, "/v1/images/edits", files=[("image", ("/home/me/secret.jpg", content))], data=form)
    assert answer.status_code == 200, answer.text
    made = base64.b64decode(answer.json()["data"][0]["b64_json"])
    assert b"where I live" not in made and b"secret" not in made


# 5. Addresses.


@pytest.mark.parametrize("address", [
    "127.0.0.1", "::1", "169.254.169.254", "10.0.0.1", "192.168.1.1", "172.16.0.1", "100.64.0.1", "224.0.0.1",
    "0.0.0.0", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "fe80::1", "fc00::1", "2002:7f00:1::", "ff02::1",
])  # fmt: skip
def test_addresses_that_are_never_asked(address, monkeypatch):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: [(family, 1, 6, "", (address, 443))])
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("it was asked"))
    assert not fetch.is_public(address)
    with pytest.raises(ApiError) as caught:
        fetch.fetch("image", "https://pictures.example/x.png", ["pictures.example"], 1000)
    assert caught.value.code == "address_not_public"


def test_public_addresses_may_be_asked():
    assert fetch.is_public("93.184.215.14") and fetch.is_public("2606:2800:220:1:248:1893:25c8:1946")


class Answer:
    def __init__(self, status, body):
        self.status, self._body = status, io.BytesIO(body)
        self.read = self._body.read


@pytest.mark.parametrize("status, body, code", [(302, b"", "invalid_image_url"), (200, b"x" * 2000, "too_large")])
def test_redirects_and_large_files(monkeypatch, status, body, code):
    asked = []
    public = [(socket.AF_INET, 1, 6, "", ("93.184.215.14", 443))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: public)
    monkeypatch.setattr(fetch._Pinned, "request", lambda self, *a, **k: asked.append(self._address))
    monkeypatch.setattr(fetch._Pinned, "getresponse", lambda self: Answer(status, body))
    with pytest.raises(ApiError) as caught:
        fetch.fetch("image", "https://pictures.example/x.png", ["pictures.example"], 1000)
    assert caught.value.code == code and asked == ["93.184.215.14"]


@pytest.mark.parametrize("url, code", [
    ("http://pictures.example/x.png", "invalid_image_url"), ("https://elsewhere.example/x.png", "host_not_allowed"),
    ("https://me:pw@pictures.example/x.png", "invalid_image_url"), ("file:///etc/passwd", "invalid_image_url"),
    ("ftp://pictures.example/x", "invalid_image_url"), ("data:image/png,x", "invalid_image"),
])  # fmt: skip
def test_addresses_in_requests(guarded, url, code):
    answer = asked(guarded, "/v1/images/edits", json={"prompt": "x", "images": [{"image_url": url}]})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == code, answer.text


def test_nothing_is_fetched_by_default(running):
    body = {"prompt": "x", "images": [{"image_url": "https://pictures.example/x.png"}]}
    answer = running.http.post("/v1/images/edits", json=body)
    assert answer.json()["error"]["code"] == "image_url_disabled"
    body = {"prompt": "x", "images": [{"file_id": "file-1"}]}
    assert running.http.post("/v1/images/edits", json=body).json()["error"]["message"].startswith("images[0]: file_id")


# 6. No files of requests.


@pytest.mark.parametrize("more", [
    {"lora": [{"name": "/etc/passwd"}]}, {"lora": [{"name": "x", "path": "/etc/passwd"}]},
    {"transformer": "/etc/passwd"},
    {"model": "/etc/passwd"}, {"vae": "/etc/passwd"}, {"image": "/etc/passwd"}, {"output": "/tmp/x"},
])  # fmt: skip
def test_paths_are_no_fields(running, more):
    answer = running.http.post("/v1/images/generations", json={**BODY, **more})
    assert answer.status_code in (400, 404) and answer.json()["error"]["param"] in more


# 7. Host, origin, content type.


@pytest.mark.parametrize("host, status", [
    ("127.0.0.1:{port}", 200), ("localhost:{port}", 200), ("[::1]:{port}", 200), ("evil.example", 403),
    ("evil.example:{port}", 403), ("127.0.0.1.evil.example", 403), ("", 403),
])  # fmt: skip
def test_host(running, host, status):
    """Against DNS rebinding."""
    answer = running.http.get("/v1/models", headers={"host": host.format(port=running.port)})
    assert answer.status_code == status


def test_origins(guarded, running):
    for headers in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}, {"origin": "null"}):
        answer = running.http.post("/v1/images/generations", json=BODY, headers=headers)
        assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    for path, to, status in (("/", "document", 200), ("/", "iframe", 403), ("/v1/models", "document", 403)):
        link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": to}
        assert running.http.get(path, headers=link).status_code == status
    same = running.http.get("/v1/models", headers={"origin": running.url, "sec-fetch-site": "same-origin"})
    assert same.status_code == 200
    allowed = {"origin": "https://page.example"}
    answer = guarded.http.options("/v1/images/generations", headers=allowed)
    assert answer.status_code == 204 and answer.headers["access-control-allow-origin"] == "https://page.example"
    answer = asked(guarded, headers=allowed)
    assert answer.headers["access-control-allow-origin"] == "https://page.example"
    assert "access-control-allow-credentials" not in answer.headers


def test_a_form_of_another_page_cannot_make_pictures(running):
    answer = running.http.post(
        "/v1/images/generations", content=json.dumps(BODY), headers={"content-type": "text/plain"}
    )
    assert answer.status_code == 415


# 8. Logs and headers.


def test_logs_have_no_prompts(running, caplog):
    with caplog.at_level("INFO", "qwen_image_fast.serving"):
        running.http.post("/v1/images/generations", json={**BODY, "prompt": "a very secret circle", "user": "me"})
        lines, until = [], time.monotonic() + 30
        while not lines or lines[-1].get("status") != 200:  # a line comes after its answer
            assert time.monotonic() < until
            lines = [json.loads(logs.JsonLines().format(record)) for record in caplog.records]
    assert lines[-1]["endpoint"] == "/v1/images/generations" and lines[-1]["request_id"]
    assert lines[-1]["size"] == "64x64" and lines[-1]["steps"] == 2
    assert "secret" not in json.dumps(lines) and '"me"' not in json.dumps(lines)


def test_headers(running):
    headers = running.http.get("/health").headers
    assert (
        "script-src 'self'" in headers["content-security-policy"] and "unsafe" not in headers["content-security-policy"]
    )
    assert headers["x-content-type-options"] == "nosniff"


# 9. Only safetensors.


def test_a_pickled_lora_is_not_loaded(models, tmp_path):
    (tmp_path / "style.bin").write_bytes(b"\x80\x04")
    with pytest.raises((ValueError, FileNotFoundError), match="pickle|safetensors"):
        models.pipe.load_lora_weights(str(tmp_path / "style.bin"))


def test_a_small_client_library_is_enough(guarded):
    assert httpx.get(f"{guarded.url}/v1/models", headers={"authorization": f"bearer {KEY}"}).status_code == 200
