// Pictures that go into a request: by file, drop and paste, in order, with a mask on the only one.

import { $, h, toast, urlOf } from "./dom.js";
import { fill, kind, usualPixels } from "./form.js";
import { paint } from "./mask.js";

const SENT = ["image/png", "image/jpeg", "image/webp"];

/** A picture as it is sent: upright, of a kind that the server reads, not much larger than the model's pictures. */
async function prepared(blob, name) {
  const bitmap = await createImageBitmap(blob);
  const most = Math.max(2 * usualPixels(), 65536);
  const scale = Math.min(1, Math.sqrt(most / (bitmap.width * bitmap.height)));
  const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * scale)));
  if (scale === 1 && SENT.includes(blob.type)) return { blob, width, height, name, mask: null };
  const canvas = h("canvas", { width, height });
  const pen = canvas.getContext("2d");
  pen.imageSmoothingQuality = "high";
  pen.drawImage(bitmap, 0, 0, width, height);
  if (scale < 1) toast(`${name} is used at ${width} × ${height}: this model's pictures are about that large.`);
  return { blob: await new Promise((done) => canvas.toBlob(done, "image/png")), width, height, name, mask: null };
}

export class References {
  list = [];

  constructor() {
    $("file").onchange = () => {
      this.add([...$("file").files]);
      $("file").value = "";
    };
  }

  async add(files) {
    for (const file of files) {
      const most = kind().most;
      try {
        const picture = await prepared(file, file.name || "The picture");
        if (this.list.length >= most) {
          if (most > 1) { toast(`This model takes up to ${most} pictures.`, { bad: true }); break; }
          this.list = [];
        }
        this.list.push(picture);
      } catch {
        toast(`${file.name || "That"} is not a picture this browser can read.`, { bad: true });
      }
    }
    if (this.list.length > 1) for (const picture of this.list) picture.mask = null;
    this.render();
  }

  /** Those of an earlier request. */
  async set(pictures, mask) {
    this.list = [];
    for (const blob of pictures) this.list.push(await prepared(blob, "The picture"));
    if (mask && this.list.length === 1) this.list[0].mask = mask;
    this.render();
  }

  render() {
    const now = kind();
    const tiles = this.list.map((picture, k) => {
      const name = this.list.length > 1 ? `Picture ${k + 1}` : "Picture";
      const buttons = [];
      if (now.canMask && this.list.length === 1) {
        buttons.push(h("button", { type: "button", id: "paint", onclick: () => this.mask(picture) }, picture.mask ? "Edit mask" : "Paint mask"));
        if (picture.mask) buttons.push(h("button", { type: "button", onclick: () => { picture.mask = null; this.render(); } }, "Clear mask"));
      }
      if (k > 0) buttons.push(h("button", { type: "button", "aria-label": `Move picture ${k + 1} forward`, onclick: () => this.swap(k) }, "←"));
      buttons.push(h("button", { type: "button", "aria-label": `Remove picture ${k + 1}`, onclick: () => this.drop(k) }, "Remove"));
      const layers = [h("img", { src: urlOf(picture.blob), alt: `${name}: ${picture.name}` })];
      if (picture.mask) layers.push(h("img", { class: "veil", src: urlOf(picture.mask), alt: "with a mask" }));
      return h("li", {}, h("figure", {}, h("div", { class: "thumb" }, ...layers), this.list.length > 1 ? h("figcaption", {}, name) : null), h("div", { class: "under" }, ...buttons));
    });
    if (this.list.length < now.most) {
      const text = this.list.length ? "Add another" : now.layers ? "The picture to take apart" : "Add a picture";
      tiles.push(h("li", { class: "add" }, h("button", { type: "button", id: "add-picture", onclick: () => $("file").click() }, h("span", { class: "plus", "aria-hidden": "true" }, "+"), text)));
    }
    $("references").replaceChildren(...tiles);
    $("references").classList.toggle("empty", !this.list.length);
    $("references-label").textContent = now.layers ? "Picture" : "Pictures to start from";
    $("references-hint").textContent = this.list.length ? (this.list.length > 1 ? "In the prompt they are Picture 1, Picture 2, …" : "") : "Choose, drop or paste.";
    $("references-field").hidden = false;
    fill();
  }

  async mask(picture) {
    const made = await paint(picture);
    if (made !== undefined) picture.mask = made;
    this.render();
    $("paint")?.focus();
  }

  swap(k) {
    [this.list[k - 1], this.list[k]] = [this.list[k], this.list[k - 1]];
    this.render();
  }

  drop(k) {
    this.list.splice(k, 1);
    this.render();
    $("add-picture")?.focus();
  }
}
