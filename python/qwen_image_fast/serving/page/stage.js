// The picture that is looked at: on its way, done, or beside what it was made from.

import { $, h, seconds, urlOf } from "./dom.js";

let comparing = false;

function framed(width, height, ...children) {
  const frame = h("div", { class: "frame" }, ...children);
  frame.style.setProperty("--ratio", width / height);
  return frame;
}

export function nothing(text) {
  $("stage").replaceChildren(h("div", { class: "empty" }, h("p", {}, text)));
}

export function left(job) {
  if (job.status === "queued" || !job.step) {
    return job.queue_position ? `Waiting, ${job.queue_position} ahead` : "Starting";
  }
  return `Step ${job.step} of ${job.steps}` + (job.eta_s ? `, ${seconds(job.eta_s)} left` : "");
}

/** A job on its way, drawn once and then brought up to date. */
export function running(job, cancel) {
  const stage = $("stage");
  if (stage.dataset.job !== job.id) {
    const [width, height] = job.size;
    const frames = Array.from({ length: job.n }, (_, k) =>
      framed(width, height, h("img", { class: "preview", alt: `Preview ${k + 1}`, hidden: true })));
    stage.replaceChildren(
      h("div", { class: `frames of-${Math.min(job.n, 4)}` }, ...frames),
      h("div", { class: "on-its-way" },
        h("progress", { max: 1, value: 0, "aria-label": "Progress" }),
        h("p", { class: "left" }),
        h("button", { type: "button", class: "quiet", id: "cancel", onclick: cancel }, "Cancel")),
      h("p", { class: "caption" }, job.body.prompt));
    stage.dataset.job = job.id;
  }
  (job.previews ?? []).forEach((preview, k) => {
    const image = stage.querySelectorAll(".preview")[k];
    if (!image) return;
    image.src = `data:image/png;base64,${preview}`;
    image.hidden = false;
  });
  if (job.steps) stage.querySelector("progress").value = job.step / job.steps;
  stage.querySelector(".left").textContent = left(job);
}

function compared(picture) {
  const before = h("img", { class: "before", src: urlOf(picture.references[0]), alt: "Before" });
  const slider = h("input", { type: "range", class: "divide", min: 0, max: 100, value: 50, step: 0.5, "aria-label": "Before and after" });
  const frame = framed(picture.width, picture.height, h("img", { src: urlOf(picture.blob), alt: picture.body.prompt }), before,
    h("i", { class: "divider", "aria-hidden": "true" }), h("span", { class: "tag" }, "Before"), h("span", { class: "tag after" }, "After"), slider);
  const move = () => frame.style.setProperty("--at", `${slider.value}%`);
  slider.oninput = move;
  move();
  return frame;
}

/** `on`: what the buttons do, by name. */
export function done(picture, on) {
  const stage = $("stage");
  delete stage.dataset.job;
  const can = picture.references.length > 0 && picture.layer === undefined;
  const facts = [
    `${picture.width} × ${picture.height}`, `${picture.body.num_inference_steps} steps`,
    picture.body.true_cfg_scale > 1 ? `guidance ${picture.body.true_cfg_scale}` : null, `seed ${picture.seed}`,
    picture.layer === undefined ? null : `layer ${picture.layer}`, picture.seconds ? `${picture.seconds.toFixed(1)} s` : null,
  ];
  const button = (name, text, more = {}) => h("button", { type: "button", id: `do-${name}`, onclick: () => on[name](picture), ...more }, text);
  const draw = () => {
    const shown = comparing && can ? compared(picture)
      : framed(picture.width, picture.height, h("img", { id: "shown", src: urlOf(picture.blob), alt: picture.body.prompt }));
    shown.classList.toggle("see-through", picture.layer !== undefined);
    const compare = can ? h("button", { type: "button", id: "do-compare", "aria-pressed": String(comparing), onclick: () => { comparing = !comparing; draw(); $("do-compare").focus(); } }, "Compare") : null;
    const name = `${picture.body.prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 48).replace(/^-|-$/g, "")}-${picture.seed}.png`;
    stage.replaceChildren(shown,
      h("div", { class: "about" }, h("p", { class: "caption" }, picture.body.prompt),
        h("p", { class: "facts" }, ...facts.filter(Boolean).map((fact) => h("span", {}, fact)))),
      h("div", { class: "actions", role: "group", "aria-label": "This picture" },
        h("a", { class: "button", id: "do-download", href: urlOf(picture.blob), download: name }, "Download"),
        compare, button("again", "New seed"), button("settings", "Same settings"), button("use", "Start from it"),
        button("remove", "Delete", { class: "quiet" })));
  };
  draw();
}
