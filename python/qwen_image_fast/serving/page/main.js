// The page: one form, one picture that is looked at, one history.

import * as api from "./api.js";
import { $, bytesOf, toast } from "./dom.js";
import * as form from "./form.js";
import * as gallery from "./gallery.js";
import * as masks from "./mask.js";
import { parametersOf } from "./png.js";
import { References } from "./references.js";
import * as stage from "./stage.js";
import * as store from "./store.js";

const jobs = new Map();
const pictures = new Map();
const references = new References();
let selected = null;
let ready = false;

// ---- what is shown --------------------------------------------------------------------------------------------------

function entries() {
  const wanted = $("search").value.trim().toLowerCase();
  const newest = (a, b) => b.created - a.created || a.index - b.index;
  const found = [...pictures.values()].sort(newest);
  return [...[...jobs.values()].sort(newest), ...found.filter((one) => one.body.prompt.toLowerCase().includes(wanted))];
}

function render() {
  const found = entries();
  if (!jobs.has(selected) && !pictures.has(selected)) selected = found[0]?.id ?? null;
  gallery.render(found, selected, { select, remove });
  $("search").hidden = pictures.size < 8;
  document.querySelector(".history").hidden = !jobs.size && !pictures.size;
  if (jobs.has(selected)) stage.running(jobs.get(selected), () => cancel(selected));
  else if (!pictures.has(selected)) stage.nothing("Pictures appear here");
  const job = [...jobs.values()].find((one) => one.step);
  document.title = job ? `${Math.round((100 * job.step) / job.steps)} % · qwen-image-fast` : "qwen-image-fast";
}

function select(id) {
  selected = id;
  render();
  if (pictures.has(id)) look();
}

function look() {
  stage.done(pictures.get(selected), {
    again: (picture) => takeOver(picture, false).then(generate),
    settings: async (picture) => {
      await takeOver(picture, true);
      toast("The form has this picture's settings and seed.");
      $("prompt").focus();
    },
    use: async (picture) => {
      await references.set([picture.blob], null);
      $("prompt").focus();
      $("prompt").select();
    },
    remove: (picture) => remove(picture.id),
  });
}

async function takeOver(picture, keepSeed) {
  form.restore({ ...picture.body, seed: picture.seed }, { keepSeed });
  await references.set(picture.references, picture.mask);
}

function remove(id) {
  if (jobs.has(id)) return cancel(id);
  const picture = pictures.get(id);
  const order = entries().map((entry) => entry.id);
  const next = order[order.indexOf(id) + 1] ?? order[order.indexOf(id) - 1] ?? null;
  pictures.delete(id);
  store.remove("pictures", id).catch(() => {});
  selected = null;
  select(next);
  toast("Deleted.", { action: ["Undo", () => { pictures.set(id, picture); store.put("pictures", picture).catch(() => {}); select(id); }] });
}

// ---- jobs -----------------------------------------------------------------------------------------------------------

async function generate() {
  if (!ready) return;
  const { endpoint, body } = form.asked();
  if (!form.prompt()) {
    toast("Say in the prompt what to make.", { bad: true });
    $("prompt").focus();
    return;
  }
  const used = endpoint === "generations" ? [] : references.list;
  if (endpoint !== "generations" && !used.length) {
    toast("Add the picture to take apart.", { bad: true });
    return;
  }
  const mask = used.length === 1 ? used[0].mask : null;
  const size = body.size ? body.size.split("x").map(Number) : [used.at(-1).width, used.at(-1).height];
  try {
    const found = await api.submit(endpoint, body, used.map((picture) => picture.blob), mask);
    const job = { id: found.id, created: Date.now(), body, size, n: body.n * (body.layers ?? 1), references: used.map((p) => p.blob), mask };
    jobs.set(job.id, job);
    store.put("jobs", job).catch(() => {}); // without it, a reload loses sight of the job
    select(job.id);
    if ($("stage").getBoundingClientRect().top > innerHeight - 160) $("stage").scrollIntoView({ block: "start", behavior: "smooth" });
    follow(job);
  } catch (error) {
    failed(error);
  }
}

async function follow(job) {
  let made = [];
  try {
    const result = await api.watch(job.id, (event) => {
      const { status, step, steps, queue_position, eta_s, previews } = event;
      Object.assign(job, { status, step, steps, queue_position, eta_s, previews: previews.length ? previews : job.previews });
      render();
    });
    const [width, height] = result.size.split("x").map(Number);
    made = result.data.map((one, index) => ({
      id: `${job.id}-${index}`, created: job.created, index, body: job.body, references: job.references, mask: job.mask,
      blob: new Blob([bytesOf(one.b64_json)], { type: "image/png" }), width, height, seed: one.seed, layer: one.layer,
      seconds: Object.values(result.timings).reduce((sum, part) => sum + part, 0),
    }));
    for (const picture of made) pictures.set(picture.id, picture);
    await Promise.all(made.map((picture) => store.put("pictures", picture))).catch(() =>
      toast("This browser has no room for the picture: it is gone after a reload unless it is downloaded.", { bad: true }));
  } catch (error) {
    if (error.status === 401) return askKey();
    if (error.status === 0) return void lost(job, error);
    if (error.code !== "cancelled" && !job.cancelled) failed(error);
  }
  jobs.delete(job.id);
  if (made.length) $("said").textContent = `Done: ${job.body.prompt}`;
  store.remove("jobs", job.id).catch(() => {});
  const looking = selected === job.id || selected === null;
  if (looking) selected = null;
  select(looking ? made[0]?.id ?? entries()[0]?.id ?? null : selected);
}

/** The server cannot be reached: it is asked again, since the job goes on there. */
function lost(job, error) {
  Object.assign(job, { status: "queued", step: 0 });
  if (!job.told) toast(`${error.message}; it is tried again.`, { bad: true });
  job.told = true;
  setTimeout(() => follow(job), 3000);
}

async function cancel(id) {
  const job = jobs.get(id);
  if (!job) return;
  job.cancelled = true;
  try {
    await api.cancel(id);
    toast("Cancelled.");
  } catch (error) {
    if (error.code !== "not_cancellable" && error.status !== 404) failed(error);
  }
}

function failed(error) {
  if (error.status === 401) return askKey();
  const text = error.message;
  toast(`${text.charAt(0).toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`, { bad: true });
}

// ---- pictures from outside ------------------------------------------------------------------------------------------

/** Of files that were dropped or pasted: settings out of one of ours, pictures to start from else. */
async function receive(files, onReferences) {
  const images = files.filter((file) => file.type.startsWith("image/"));
  if (files.length && !images.length) toast("Only pictures can be dropped here.", { bad: true });
  if (!images.length) return;
  const found = images.length === 1 && !onReferences ? await parametersOf(images[0]) : null;
  if (!found) return references.add(images);
  const missing = form.restore(found);
  if (found.image || found.control) missing.push("the pictures it was made from");
  const text = missing.length ? `Its settings are in the form, but for ${missing.join(" and ")}.` : "Its settings are in the form.";
  toast(text, { action: ["Start from it instead", () => references.add(images)] });
  $("prompt").focus();
}

function listenToDrops() {
  let depth = 0;
  const isFiles = (event) => event.dataTransfer?.types.includes("Files");
  const over = (change) => {
    depth = Math.max(0, depth + change);
    $("drop").hidden = depth === 0;
  };
  addEventListener("dragenter", (event) => isFiles(event) && over(1));
  addEventListener("dragleave", (event) => isFiles(event) && over(-1));
  addEventListener("dragover", (event) => isFiles(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    if (!isFiles(event)) return;
    event.preventDefault();
    depth = 0;
    over(0);
    receive([...event.dataTransfer.files], Boolean(event.target.closest?.("#references-field")));
  });
  addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (!files.length) return;
    event.preventDefault();
    receive(files, false);
  });
}

// ---- keys, theme, server --------------------------------------------------------------------------------------------

function listenToKeys() {
  addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]") || event.isComposing || event.repeat) return;
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      generate();
    } else if (event.key === "Escape") {
      const job = jobs.get(selected) ?? [...jobs.values()].at(-1);
      if (job) cancel(job.id);
    }
  });
}

function theme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const show = () => {
    const chosen = localStorage.getItem("theme");
    const now = chosen ?? (dark.matches ? "dark" : "light");
    if (chosen) document.documentElement.dataset.theme = chosen;
    else delete document.documentElement.dataset.theme;
    $("theme").setAttribute("aria-pressed", String(now === "dark"));
    return now;
  };
  dark.addEventListener("change", show);
  $("theme").onclick = () => {
    localStorage.setItem("theme", show() === "dark" ? "light" : "dark");
    show();
  };
  show();
}

function askKey() {
  if ($("key-dialog").open) return;
  $("key-form").onsubmit = () => {
    api.setKey($("key").value.trim());
    location.reload();
  };
  $("key-dialog").showModal();
}

function say(state, text) {
  $("server").dataset.state = state;
  $("server-text").textContent = text;
}

async function connect() {
  try {
    await api.isReady();
  } catch (error) {
    say(error.status === 503 ? "loading" : "gone", error.status === 503 ? "The model is being loaded" : "The server cannot be reached");
    setTimeout(connect, 1000);
    return;
  }
  try {
    const { data, about } = await api.models();
    form.setUp({ ...about, model: data[0].id }, references);
    references.render();
    ready = true;
    $("generate").disabled = false;
    say("ready", data[0].id);
    render();
  } catch (error) {
    if (error.status === 401) askKey();
    else setTimeout(connect, 1000);
  }
}

async function begin() {
  theme();
  masks.setUp();
  listenToDrops();
  listenToKeys();
  $("form").onsubmit = (event) => {
    event.preventDefault();
    generate();
  };
  $("search").oninput = render;
  try {
    for (const picture of await store.all("pictures")) pictures.set(picture.id, picture);
    for (const job of await store.all("jobs")) {
      jobs.set(job.id, job);
      follow(job);
    }
  } catch {
    toast("This browser keeps no history here: pictures are gone after a reload.", { bad: true });
  }
  render();
  if (pictures.has(selected)) look();
  connect();
}

begin();
