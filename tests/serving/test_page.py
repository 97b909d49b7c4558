"""The page at `/`, in a headless Chromium: what a person does there, down to what the server is sent."""

import asyncio
import base64
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serving_harness import PROMPTS, alone, picture, png, task

from qwen_image_fast.png_metadata import read_request, write_png
from qwen_image_fast.serving import static

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update"]  # fmt: skip
HAND_OVER = """([name, bytes, at, pasted]) => {
    const files = new DataTransfer();
    files.items.add(new File([Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0))], name, {type: "image/png"}));
    const given = {dataTransfer: files, clipboardData: files, bubbles: true, cancelable: true};
    for (const kind of pasted ? ["paste"] : ["dragenter", "dragover", "drop"])
        document.querySelector(at).dispatchEvent(new (pasted ? ClipboardEvent : DragEvent)(kind, given));
}"""


def contents():
    return {path.name: path.read_text(encoding="utf-8") for path in static.PAGE.iterdir()}


# ---- without a browser ----------------------------------------------------------------------------------------------


def test_the_page_is_small():
    assert sum(path.stat().st_size for path in static.PAGE.iterdir()) < 150_000


def test_the_page_names_nothing_elsewhere():
    found = contents()
    for name, text in found.items():
        assert not re.search(r"//[\w-]+\.\w", text.replace("http://www.w3.org/2000/svg", "")), name
        assert not re.search(r"<[^>]+\s(style|on\w+)=", text), f"{name}: what the Content-Security-Policy forbids"
    named = {n for t in found.values() for n in re.findall(r'(?:"\./|"page/)([\w.-]+)"', t)}
    assert named | {"index.html"} == set(found), "every file is used, and every used file is there"


def test_files_are_served_and_nothing_else(running):
    types = {"": "text/html", "page/style.css": "text/css", "page/main.js": "text/javascript",
             "page/icon.svg": "image/svg+xml"}  # fmt: skip
    for name, kind in types.items():
        answer = running.http.get(f"/{name}")
        assert (answer.status_code, answer.headers["content-type"].partition(";")[0]) == (200, kind)
        assert "script-src 'self'" in answer.headers["content-security-policy"]
        again = running.http.get(f"/{name}", headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    for name in ("page/static.py", "page/..%2fstatic.py", "page/", "page/%2e%2e/app.py"):
        answer = running.http.get(f"/{name}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_schedules_that_the_page_offers(tmp_path):
    """By Node, where it is there: the sizes that are named, and the nearest schedule to what is asked for."""
    if (node := shutil.which("node")) is None:
        pytest.skip("there is no node")
    (tmp_path / "schedules.mjs").write_text(contents()["schedules.js"], encoding="utf-8")
    (tmp_path / "test.mjs").write_text("""
import { fitting, sizes } from "./schedules.mjs";
const own = [[20, 64, 64], [50, 64, 64], [20, 96, 64]].map(([steps, width, height]) => ({ steps, width, height }));
const fast = [{ steps: 4, lightning: 4 }];
console.log(JSON.stringify([
  sizes([]), sizes(own), sizes(fast), fitting([], { width: 9, height: 9, steps: 9 }) ?? null,
  fitting(own, { width: 64, height: 64, steps: 47 }), fitting(own, { width: 128, height: 64, steps: 50 }),
  fitting(fast, { width: 640, height: 64, steps: 50 }),
]));
""")
    found = subprocess.run([node, tmp_path / "test.mjs"], capture_output=True, text=True, check=True).stdout
    assert json.loads(found) == [
        [], ["64x64", "96x64"], [], None, {"steps": 50, "width": 64, "height": 64},
        {"steps": 20, "width": 96, "height": 64}, {"steps": 4, "lightning": 4},
    ]  # fmt: skip


# ---- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra dev)")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Visit:
    """A page in a fresh profile; `end` says what went wrong in it."""

    def __init__(self, browser, server):
        self.server, self.wrong = server, []
        self.context = browser.new_context(viewport={"width": 1280, "height": 900})
        self.context.set_default_timeout(30_000)
        self.page = self.context.new_page()
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("console", lambda said: self._said(said))
        self.page.on("request", lambda request: self._asked(request))
        self.page.goto(server.url)

    def _said(self, said):
        if said.type == "error" and "Failed to load resource" not in said.text:  # statuses are shown on the page
            self.wrong.append(said.text)

    def _asked(self, request):
        if not request.url.startswith((self.server.url, "blob:", "data:")):
            self.wrong.append(f"asked {request.url}")

    def fill(self, prompt, side=64, seed=7, steps=3):
        self.page.wait_for_selector("#generate:enabled")
        self.page.locator("#more").evaluate("more => { more.open = true }")
        self.page.fill("#prompt", prompt)
        for name in ("width", "height"):
            if self.page.is_visible(f"#{name}"):
                self.page.fill(f"#{name}", str(side))
        self.page.fill("#seed", str(seed))
        self.page.fill("#steps", str(steps))
        return self.page

    def downloaded(self, path):
        with self.page.expect_download() as found:
            self.page.click("#do-download")
        found.value.save_as(path)
        return found.value.suggested_filename

    def end(self):
        self.context.close()
        assert not self.wrong


@pytest.fixture
def visit(chromium, running):
    found = Visit(chromium, running)
    yield found
    found.end()


def drop(page, name, content, at, pasted=False):
    page.evaluate(HAND_OVER, [name, base64.b64encode(content).decode(), at, pasted])


def test_a_picture_and_its_history(visit, running, models, tmp_path, monkeypatch):
    """Made by the keyboard, seen on its way, downloaded with its parameters, still there after a reload."""
    seen, finish = threading.Event(), running.server.desk._finish

    async def once_seen(job):
        await asyncio.to_thread(seen.wait, 30)
        await finish(job)

    monkeypatch.setattr(running.server.desk, "_finish", once_seen)
    page = visit.fill(PROMPTS[0], steps=6)
    page.press("#prompt", "Control+Enter")
    page.wait_for_selector("#stage .preview:not([hidden])")
    assert re.fullmatch(r"Step [1-6] of 6(, \d+ s left)?", page.inner_text("#stage .left"))
    assert "% · " in page.title()
    seen.set()
    page.wait_for_selector("#shown")
    file = tmp_path / "x.png"
    assert visit.downloaded(file) == "a-red-circle-on-the-left-of-a-blue-square-7.png"
    request, _, _ = read_request(file)
    assert (request.prompt, request.seed, request.steps, request.size({})) == (PROMPTS[0], 7, 6, (64, 64))
    expected = alone(models, task(PROMPTS[0], 64, steps=6, seed=7))[0]
    assert np.array_equal(Image.open(file), expected)

    page.click("#lock")  # a new seed for each
    page.click("#generate")
    page.locator("#gallery .tile:not(.job)").nth(1).wait_for()
    page.reload()
    page.wait_for_selector("#shown")
    page.wait_for_selector("#generate:enabled")
    assert page.locator("#gallery .tile").count() == 2
    assert page.input_value("#prompt") == PROMPTS[0]
    page.focus("#gallery .tile[aria-current=true]")
    page.keyboard.press("ArrowRight")
    assert page.get_attribute("#gallery li:nth-child(2) .tile", "aria-current") == "true"
    assert "seed 7" in page.inner_text("#stage .facts")
    page.keyboard.press("Delete")
    page.locator("#gallery:not(:has(li:nth-child(2)))").wait_for()
    page.click(".toast >> text=Undo")
    assert page.locator("#gallery .tile").count() == 2


def test_cancel_and_a_reload_on_the_way(visit, running):
    visit.page.wait_for_selector("#generate:enabled")
    visit.page.locator("#steps").evaluate("steps => { steps.max = 1000 }")
    page = visit.fill(PROMPTS[2], side=160, steps=1000)
    page.click("input[name=n][value='4'] + span")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#stage .preview:not([hidden])")
    assert page.locator("#stage .preview").count() == 4
    page.reload()  # the job goes on, and the page finds it again
    page.wait_for_selector("#stage .preview:not([hidden])")
    page.keyboard.press("Escape")
    page.wait_for_selector("#stage .empty")
    assert page.locator("#gallery .tile").count() == 0
    assert not running.server.desk.jobs
    page.reload()
    page.wait_for_selector("#generate:enabled")
    assert page.locator("#gallery .tile").count() == 0


def test_a_png_gives_its_settings_back(visit, tmp_path):
    page = visit.fill("something else", seed=1)
    made = {"kind": "text", "prompt": "“水” in green", "seed": 2**40, "steps": 200, "cfg": 3.5, "width": 176,
            "height": 96, "negative_prompt": "blur", "lora": [{"name": "style", "scale": 0.5}]}  # fmt: skip
    write_png(tmp_path / "made.png", picture(176, 96), made)
    content = (tmp_path / "made.png").read_bytes()
    drop(page, "made.png", content, "main")
    page.wait_for_selector(".toast")
    values = {name: page.input_value(f"#{name}") for name in ("prompt", "seed", "steps", "cfg", "negative", "width")}
    assert values == {"prompt": "“水” in green", "seed": str(2**40), "steps": "200", "cfg": "3.5", "negative": "blur",
                      "width": "176"}  # fmt: skip
    assert page.is_checked("#lora-0") and page.is_checked("input[name=ratio][value='16:9']")
    assert page.get_attribute("#lock", "aria-pressed") == "true"
    assert page.locator("#references img").count() == 0
    drop(page, "made.png", content, "#references-field")  # there it is a picture to start from
    page.wait_for_selector("#references img")
    drop(page, "broken.png", content[:60], "main")
    page.wait_for_selector(".toast.bad")
    assert "broken.png is not a picture" in page.inner_text(".toast.bad")


def test_a_mask_is_painted_and_the_edit_compared(visit, running, models, tmp_path, monkeypatch):
    came, submit = [], running.server.desk.submit
    monkeypatch.setattr(running.server.desk, "submit", lambda job: (came.append(dict(job.task.opened)), submit(job)))
    page = visit.fill("make it blue")
    (tmp_path / "a.png").write_bytes(png(picture(96, 64)))
    page.set_input_files("#file", tmp_path / "a.png")
    page.click("#paint")
    canvas = page.locator("#mask-canvas")
    painted = (
        "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter((v, k) => k % 4 == 3 && v).length"
    )
    box = canvas.bounding_box()

    def stroke(x, y, to_x, to_y):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        page.mouse.down()
        page.mouse.move(box["x"] + to_x * box["width"], box["y"] + to_y * box["height"], steps=5)
        page.mouse.up()

    stroke(0.2, 0.5, 0.3, 0.5)
    first = canvas.evaluate(painted)
    stroke(0.8, 0.2, 0.8, 0.8)
    assert canvas.evaluate(painted) > first > 0
    page.click("#mask-undo")
    assert canvas.evaluate(painted) == first
    page.click("#mask-clear")
    assert canvas.evaluate(painted) == 0
    page.keyboard.press("Control+z")
    assert canvas.evaluate(painted) == first
    page.click("#mask-invert")
    page.click("#mask-undo")
    page.click("#mask-done")
    page.click("#generate")
    page.wait_for_selector("#do-compare")

    alpha = 255 - np.asarray(came[-1]["mask"])
    assert alpha.shape == (64, 96) and set(np.unique(alpha)) == {0, 255}
    assert abs((alpha == 0).sum() - first) <= first * 0.3  # what is half painted at the edge is not in it
    assert (alpha[32, 19], alpha[32, 28], alpha[32, 76], alpha[2, 2]) == (0, 0, 255, 255)
    visit.downloaded(tmp_path / "edited.png")
    opened = {"image": [picture(96, 64)], "mask": Image.fromarray(255 - alpha)}
    expected = alone(models, task("make it blue", kind="edit", opened=opened, steps=3, seed=7, strength=1.0))[0]
    assert np.array_equal(Image.open(tmp_path / "edited.png"), expected)

    page.click("#do-compare")
    slider = page.locator(".divide")
    slider.press("End")
    assert page.locator(".frame").evaluate("f => f.style.getPropertyValue('--at')") == "100%"
    slider.press("Home")
    assert page.locator(".before").evaluate("i => getComputedStyle(i).clipPath") == "inset(0px 100% 0px 0px)"

    page.click("text=Clear mask")  # several pictures, in their order
    (tmp_path / "b.png").write_bytes(png(picture(64, 64, 3)))
    page.set_input_files("#file", tmp_path / "b.png")
    page.wait_for_selector("#references li:nth-child(2) img")
    assert page.locator("#paint").count() == 0
    page.click("[aria-label='Move picture 2 forward']")
    page.click("#generate")
    page.locator("#gallery .tile:not(.job)").nth(1).wait_for()
    assert [image.size for image in came[-1]["image"]] == [(64, 64), (96, 64)] and "mask" not in came[-1]


@pytest.mark.parametrize("model_class, shown", [
    ("QwenImageLayeredPipeline", {"layers-field"}),
    ("QwenImagePipeline", {"ratio-field"}),
])  # fmt: skip
def test_what_the_model_cannot_do_is_not_shown(visit, running, model_class, shown):
    about = {"class": model_class, "defaults": {"cfg": 4.0}, "loras": []}
    answer = json.dumps({**running.http.get("/v1/models").json(), "about": about})
    visit.page.route("**/v1/models", lambda route: route.fulfill(body=answer, content_type="application/json"))
    visit.page.reload()
    page = visit.fill("a fox")
    fields = ("layers-field", "ratio-field", "loras-field", "strength-field")
    assert {name for name in fields if page.is_visible(f"#{name}")} == shown
    assert page.is_visible("#negative-field")
    if "ratio-field" in shown:
        page.click("input[name=ratio][value='16:9'] ~ span")
        assert page.inner_text("#size") == "1664 × 928"
        drop(page, "a.png", png(picture(64, 64)), "main")
        page.wait_for_selector("#strength-field:visible")
        assert not page.is_visible("#ratio-field") and page.locator("#add-picture").count() == 0


def test_a_picture_is_pasted_and_no_history_is_no_failure(visit):
    """As in a private window of some browsers: nothing is kept, and all else works."""
    visit.context.add_init_script("indexedDB.open = () => { throw new Error('not here') }")
    visit.page.reload()
    page = visit.fill("make it blue")
    assert "keeps no history" in page.inner_text(".toast.bad")
    drop(page, "a.png", png(picture(64, 64)), "#prompt", pasted=True)
    page.wait_for_selector("#references img")
    page.click("#generate")
    page.wait_for_selector("#do-compare")
    assert "no room" in page.inner_text("#toasts") and page.locator("#gallery .tile").count() == 1


def test_names_for_screen_readers_themes_and_narrow_screens(visit):
    page = visit.fill("a fox")
    drop(page, "a.png", png(picture(64, 64)), "main")
    page.wait_for_selector("#references img")
    nameless = page.evaluate("""() => [...document.querySelectorAll("button, input, textarea, a, canvas, img")]
        .filter((e) => e.type !== "file" && !(e.labels?.length || e.getAttribute("aria-label") || e.hasAttribute("alt")
            || e.textContent.trim())).map((e) => e.outerHTML)""")
    assert not nameless
    colour = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(colour)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(colour)
    page.click("#theme")
    assert page.evaluate(colour) == light != dark and page.get_attribute("#theme", "aria-pressed") == "false"
    page.set_viewport_size({"width": 340, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") == 340
    assert [
        e.get_attribute("id") for e in page.locator("main, form.panel").all() if e.bounding_box()["width"] > 340
    ] == []


def test_a_key_is_asked_for_and_errors_are_said(chromium, models):
    from http_harness import Running

    key = "a-key-of-the-studio"
    server = Running(models, keys=[{"name": "studio", "key": key}])
    try:
        visit = Visit(chromium, server)
        visit.page.fill("#key", key)
        visit.page.press("#key", "Enter")
        page = visit.fill("  ")
        page.click("#generate")
        page.wait_for_selector(".toast.bad")
        page = visit.fill(PROMPTS[0], side=8000)  # more than is allowed
        page.click("#generate")
        page.wait_for_selector(".toast.bad:has-text('size must have at most')")
        page.evaluate("localStorage.removeItem('key')")
        page.reload()
        page.wait_for_selector("#key-dialog[open]")
        visit.end()
    finally:
        server.end()


def test_the_wheel_has_the_page():
    """The package's folder goes into it whole; what git ignores would not."""
    import subprocess

    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        pytest.skip("not a working tree of git")
    page = root / "python/qwen_image_fast/serving/page"
    ignored = subprocess.run(["git", "check-ignore", *page.iterdir()], cwd=root, capture_output=True, text=True)
    assert ignored.returncode == 1 and ignored.stdout == ""
    assert {p.name for p in static.PAGE.iterdir()} == {p.name for p in page.iterdir()}
