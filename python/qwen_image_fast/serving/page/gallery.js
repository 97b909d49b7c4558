// The history: jobs on their way and pictures, newest first, moved through with arrow keys.

import { $, h, urlOf } from "./dom.js";
import { left } from "./stage.js";

let shown = [];

/** `entries`: jobs and pictures; `select(id)`, `remove(id)`. */
export function render(entries, selected, { select, remove }) {
  const list = $("gallery");
  const focused = list.contains(document.activeElement);
  shown = entries.map((entry) => entry.id);
  const known = new Map([...list.children].map((item) => [item.dataset.id, item]));
  const items = entries.map((entry) => {
    const job = entry.blob === undefined;
    const item = known.get(entry.id) ?? tile(entry, job, select);
    const button = item.firstChild;
    button.setAttribute("aria-current", String(entry.id === selected));
    button.tabIndex = entry.id === (shown.includes(selected) ? selected : shown[0]) ? 0 : -1;
    if (job) update(item, entry);
    return item;
  });
  if (items.length !== list.children.length || items.some((item, k) => item !== list.children[k])) list.replaceChildren(...items);
  if (focused && !list.contains(document.activeElement)) list.querySelector("[aria-current=true]")?.focus();
  list.onkeydown = (event) => {
    const at = shown.indexOf(event.target.closest("li")?.dataset.id);
    if (at < 0) return;
    const columns = getComputedStyle(list).gridTemplateColumns.split(" ").length;
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -shown.length, End: shown.length };
    if (event.key === "Delete") remove(shown[at]);
    else if (event.key in moves) {
      const next = Math.max(0, Math.min(shown.length - 1, at + moves[event.key]));
      select(shown[next]);
      list.children[next]?.firstChild.focus();
    } else return;
    event.preventDefault();
  };
}

function tile(entry, job, select) {
  const image = job ? h("img", { alt: "", hidden: true }) : h("img", { src: urlOf(entry.blob), alt: "", loading: "lazy" });
  const label = job ? `On its way: ${entry.body.prompt}` : `${entry.body.prompt}, seed ${entry.seed}`;
  const button = h("button", { type: "button", class: job ? "tile job" : "tile", "aria-label": label, title: entry.body.prompt, onclick: () => select(entry.id) },
    image, job ? h("progress", { max: 1, value: 0, "aria-hidden": "true" }) : null, job ? h("span", { class: "left" }) : null);
  const item = h("li", {}, button);
  item.dataset.id = entry.id;
  return item;
}

function update(item, job) {
  const image = item.querySelector("img");
  if (job.previews?.[0]) {
    image.src = `data:image/png;base64,${job.previews[0]}`;
    image.hidden = false;
  }
  if (job.steps) item.querySelector("progress").value = job.step / job.steps;
  item.querySelector(".left").textContent = job.step ? `${job.step} / ${job.steps}` : left(job);
}
