"""`data prefer`: two pictures of one prompt beside each other in a browser, and a key for the better one.

What is said is added to a file of pairs at once, as `train dpo --pairs` reads it; what was compared is not asked again.
The page is served on this machine alone.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from qwen_image_fast.files import atomic_write
from qwen_image_fast.png_metadata import read_parameters
from qwen_image_fast.training.text_files import beside, decoded

_log = logging.getLogger(__name__)

LEFT, RIGHT, SKIP, UNDO = "left", "right", "skip", "undo"
_KINDS = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
_LONGEST_BODY = 4096


@dataclass(frozen=True)
class Pair:
    """Two pictures of a prompt, the first on the left."""

    prompt: str
    left: Path
    right: Path


def pictures_of(folder: Path) -> dict[str, list[Path]]:
    """The pictures of a folder by their prompt: that in a PNG of `generate`, or the text in NAME.txt beside it.

    Raises:
        ValueError: there are no two pictures of one prompt.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in _KINDS):
        text = beside(path, ".txt")
        try:
            prompt = decoded(text.read_bytes()) if text is not None else _inside(path)
        except (OSError, ValueError):
            continue
        if prompt:
            found.setdefault(prompt, []).append(path)
    if not any(len(paths) > 1 for paths in found.values()):
        raise ValueError(
            f"data prefer: {folder} has no two pictures of one prompt: draw some with `generate --images 4`, whose "
            "files say their prompt, or put it beside each picture in NAME.txt"
        )
    return {prompt: paths for prompt, paths in found.items() if len(paths) > 1}


def _inside(path: Path) -> str:
    return str(read_parameters(path).get("prompt") or "")


def pairs_of(pictures: Mapping[str, Sequence[Path]]) -> list[Pair]:
    """Every two pictures of each prompt, in an order and on sides that say nothing: by hashes of their names."""

    def drawn(*parts: object) -> bytes:
        return hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()

    found = []
    for prompt, paths in pictures.items():
        for one, other in itertools.combinations(paths, 2):
            turned = drawn("side", one.name, other.name)[0] % 2
            found.append(Pair(prompt, *((other, one) if turned else (one, other))))
    return sorted(found, key=lambda pair: drawn("order", pair.left.name, pair.right.name))


class Comparisons:
    """What is still to be compared, and the file of what was said.

    Args:
        pairs: of `pairs_of`. out: JSON lines with prompt, chosen and rejected, paths from its folder; pairs that were
            passed over stand in `<out>.passed`.
    """

    def __init__(self, pairs: Sequence[Pair], out: Path):
        self.pairs, self.out, self.passed = list(pairs), out, out.with_name(out.name + ".passed")
        self.lock, self.said = Lock(), list[Path]()  # the file of each answer of this session
        for path in (out, self.passed):
            _mend(path)
        known = {frozenset(names) for path in (out, self.passed) for names in map(self._names, _lines(path))}
        self.waiting = [p for p in self.pairs if frozenset(map(self._from_out, (p.left, p.right))) not in known]
        self.answered: list[Pair] = []

    def next(self) -> tuple[int, Pair | None]:
        """How many were compared, and the next two pictures."""
        with self.lock:
            done = len(self.pairs) - len(self.waiting)
            return done, self.waiting[0] if self.waiting else None

    def answer(self, number: int, choice: str) -> None:
        """Of the pair before which `number` were compared; another one's is an old page's and does nothing.

        Raises:
            ValueError: no such choice. OSError: it could not be written.
        """
        if choice not in (LEFT, RIGHT, SKIP, UNDO):
            raise ValueError(f"data prefer: choice must be left, right, skip or undo, got {choice!r}")
        with self.lock:
            if number != len(self.pairs) - len(self.waiting):
                return
            if choice == UNDO:
                self._undo()
                return
            if not self.waiting:
                return
            pair = self.waiting[0]
            chosen, rejected = (pair.right, pair.left) if choice == RIGHT else (pair.left, pair.right)
            line = {"prompt": pair.prompt, "chosen": self._from_out(chosen), "rejected": self._from_out(rejected)}
            path = self.passed if choice == SKIP else self.out
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self.answered.append(self.waiting.pop(0))
            self.said.append(path)

    def _undo(self) -> None:
        if not self.said:
            return
        path = self.said.pop()
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[:-1]), encoding="utf-8")
        self.waiting.insert(0, self.answered.pop())

    def _from_out(self, path: Path) -> str:
        return os.path.relpath(path.resolve(), self.out.parent.resolve())

    def _names(self, line: Mapping[str, Any]) -> tuple[str, str]:
        return str(line.get("chosen")), str(line.get("rejected"))


def _mend(path: Path) -> None:
    """End the last line; the half of one, which a kill leaves, goes."""
    content = path.read_bytes() if path.is_file() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) == len(content):
        return
    try:
        json.loads(content[len(whole) :])
        whole = content + b"\n"
    except ValueError:
        _log.warning("data prefer: the last line of %s was half written and is left out", path)
    atomic_write(path, lambda file: file.write(whole))


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # somebody else's
    return [line for line in found if isinstance(line, dict)]


def server(comparisons: Comparisons, port: int) -> ThreadingHTTPServer:
    """The page, on 127.0.0.1; port 0: any free one. OSError where the port is taken."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self._foreign():
                return
            done, pair = comparisons.next()
            if self.path == "/":
                self._send(200, "text/html; charset=utf-8", PAGE.encode())
            elif self.path == "/next":
                prompt = pair.prompt if pair else ""
                self._json({"done": done, "total": len(comparisons.pairs), "prompt": prompt, "more": pair is not None})
            elif pair is not None and self.path.partition("?")[0] in ("/left", "/right"):
                path = pair.left if self.path.startswith("/left") else pair.right
                try:
                    self._send(200, _KINDS[path.suffix.lower()], path.read_bytes())
                except OSError as error:
                    self._json({"error": str(error)}, 404)
            else:
                self._json({"error": "there is nothing here"}, 404)

        def do_POST(self) -> None:
            if self._foreign():
                return
            try:
                length = int(self.headers.get("Content-Length", "0"))
                if self.headers.get("Content-Type") != "application/json" or not 0 < length <= _LONGEST_BODY:
                    raise ValueError("data prefer: the answer must be JSON")
                found = json.loads(self.rfile.read(length))
                comparisons.answer(int(found["done"]), str(found["choice"]))
                self._json({})
            except (ValueError, LookupError, TypeError) as error:
                self._json({"error": str(error)}, 400)
            except OSError as error:
                self._json({"error": f"it was not written: {error}"}, 500)

        def _foreign(self) -> bool:
            """A page of another site whose name was made to lead here must not read or write anything."""
            host = (self.headers.get("Host") or "").partition(":")[0]
            if host in ("127.0.0.1", "localhost"):
                return False
            self._json({"error": "only 127.0.0.1 is served"}, 403)
            return True

        def _json(self, value: dict[str, Any], status: int = 200) -> None:
            self._send(status, "application/json", json.dumps(value).encode())

        def _send(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", port), Page)


PAGE = """<!doctype html>
<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Which is better?</title>
<style>
body { margin: 0; font: 16px system-ui; background: #222; color: #eee; text-align: center }
main { display: flex; gap: 12px; justify-content: center; padding: 0 12px }
button { flex: 1; max-width: 46vw; padding: 6px; border: 2px solid #444; background: none; cursor: pointer }
button:hover, button:focus { border-color: #8cf }
img { width: 100%; max-height: 72vh; object-fit: contain; image-rendering: auto }
p { margin: 12px; min-height: 1.4em } small { color: #aaa }
</style>
<p id="prompt"></p>
<main><button id="left" aria-label="the left one is better"><img alt="left picture"></button>
<button id="right" aria-label="the right one is better"><img alt="right picture"></button></main>
<p><small id="state"></small><br><small>&larr; left is better &middot; &rarr; right is better &middot; space passes
&middot; u takes back</small></p>
<script>
const by = id => document.getElementById(id);
let now = null, busy = false;
async function show() {
  now = await (await fetch("/next")).json();
  by("prompt").textContent = now.more ? now.prompt : "All pairs are compared.";
  by("state").textContent = now.done + " of " + now.total;
  for (const side of ["left", "right"]) {
    by(side).hidden = !now.more;
    if (now.more) by(side).firstChild.src = "/" + side + "?" + now.done;
  }
}
async function say(choice) {
  if (busy || !now) return;
  busy = true;
  const headers = {"Content-Type": "application/json"};
  const answer = await fetch("/", {method: "POST", headers, body: JSON.stringify({done: now.done, choice})});
  if (answer.ok) await show(); else by("state").textContent = (await answer.json()).error;
  busy = false;
}
for (const side of ["left", "right"]) by(side).onclick = () => say(side);
const keys = {ArrowLeft: "left", ArrowRight: "right", " ": "skip", u: "undo"};
onkeydown = event => { if (keys[event.key]) { event.preventDefault(); say(keys[event.key]); } };
show();
</script>
"""
