// A mask is painted over a picture: strokes are kept as what the canvas was before them, for undo.

import { $, urlOf } from "./dom.js";

const KEPT = 30;
let pen = null;
let undone = [];
let erasing = false;

/** The mask as a PNG of the picture's size, transparent where it may change; null: none; undefined: left as it was. */
export async function paint(picture) {
  const canvas = $("mask-canvas");
  [canvas.width, canvas.height] = [picture.width, picture.height];
  $("mask-picture").src = urlOf(picture.blob);
  document.querySelector(".mask-sheet").style.setProperty("--ratio", picture.width / picture.height);
  pen = canvas.getContext("2d", { willReadFrequently: true });
  undone = [];
  if (picture.mask) await unfold(picture.mask, canvas);
  buttons();
  $("mask").returnValue = "";
  $("mask").showModal();
  await new Promise((resolve) => $("mask").addEventListener("close", resolve, { once: true }));
  if ($("mask").returnValue !== "done") return undefined;
  return fold(canvas);
}

/** From colour where it may change to opaque elsewhere. */
async function fold(canvas) {
  const painted = pen.getImageData(0, 0, canvas.width, canvas.height);
  let some = false;
  for (let k = 0; k < painted.data.length; k += 4) {
    const changes = painted.data[k + 3] > 127;
    some ||= changes;
    painted.data.set([0, 0, 0, changes ? 0 : 255], k);
  }
  if (!some) return null;
  pen.putImageData(painted, 0, 0);
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}

async function unfold(mask, canvas) {
  pen.drawImage(await createImageBitmap(mask), 0, 0, canvas.width, canvas.height);
  invert();
}

const colour = () => getComputedStyle(document.documentElement).getPropertyValue("--mask").trim();

function invert() {
  const { width, height } = $("mask-canvas");
  pen.save();
  pen.globalCompositeOperation = "source-out";
  pen.fillStyle = colour();
  pen.fillRect(0, 0, width, height);
  pen.restore();
}

function remember() {
  const { width, height } = $("mask-canvas");
  undone.push(pen.getImageData(0, 0, width, height));
  if (undone.length > KEPT) undone.shift();
  buttons();
}

function undo() {
  if (undone.length) pen.putImageData(undone.pop(), 0, 0);
  buttons();
}

function buttons() {
  $("mask-undo").disabled = !undone.length;
  $("mask-erase").setAttribute("aria-pressed", String(erasing));
}

function changed(make) {
  return () => {
    remember();
    make();
  };
}

function place(event) {
  const canvas = $("mask-canvas");
  const box = canvas.getBoundingClientRect();
  return [((event.clientX - box.left) * canvas.width) / box.width, ((event.clientY - box.top) * canvas.height) / box.height];
}

export function setUp() {
  const canvas = $("mask-canvas");
  let last = null;
  canvas.onpointerdown = (event) => {
    if (event.button) return;
    canvas.setPointerCapture(event.pointerId);
    remember();
    last = place(event);
    line(event);
  };
  canvas.onpointermove = (event) => {
    if (last) for (const one of event.getCoalescedEvents?.() ?? [event]) line(one);
  };
  canvas.onpointerup = canvas.onpointercancel = () => { last = null; };

  function line(event) {
    const next = place(event);
    pen.globalCompositeOperation = erasing ? "destination-out" : "source-over";
    pen.strokeStyle = colour();
    pen.lineWidth = ($("brush").value / 100) * Math.min(canvas.width, canvas.height);
    pen.lineCap = pen.lineJoin = "round";
    pen.beginPath();
    pen.moveTo(...last);
    pen.lineTo(next[0] + 0.01, next[1]);
    pen.stroke();
    last = next;
  }

  $("mask-erase").onclick = () => { erasing = !erasing; buttons(); };
  $("mask-undo").onclick = undo;
  $("mask-invert").onclick = changed(invert);
  $("mask-clear").onclick = changed(() => pen.clearRect(0, 0, canvas.width, canvas.height));
  $("mask-done").onclick = () => $("mask").close("done");
  $("mask-cancel").onclick = () => $("mask").close("");
  $("mask").addEventListener("keydown", (event) => {
    if (event.key === "z" && (event.ctrlKey || event.metaKey)) undo();
    else if (event.key === "[" || event.key === "]") $("brush").value = Number($("brush").value) + (event.key === "]" ? 3 : -3);
    else return;
    event.preventDefault();
  });
}
