// The form: what is asked for, kept over reloads; what this server's model cannot do is not shown.

import { $, choice, h } from "./dom.js";
import { fitting, sizes } from "./schedules.js";
import { keepForm, keptForm } from "./store.js";

const RATIOS = ["9:16", "2:3", "3:4", "1:1", "4:3", "3:2", "16:9"];
// The sizes that Qwen-Image was tuned for.
const TUNED = {
  "1:1": [1328, 1328], "16:9": [1664, 928], "9:16": [928, 1664], "4:3": [1472, 1104],
  "3:4": [1104, 1472], "3:2": [1584, 1056], "2:3": [1056, 1584],
};
const LAYERED = "QwenImageLayeredPipeline", TEXT = "QwenImagePipeline", EDIT = "QwenImageEditPipeline";

export const about = { class: "", defaults: {}, schedules: [], loras: [] };
let ratios = RATIOS;
let usual = {};
let values = {};
let show = {};
let references = null;

/** `pictures`: the list of references, which says what kind of request this is. */
export function setUp(found, pictures) {
  Object.assign(about, found);
  references = pictures;
  const given = about.defaults;
  usual = { width: 1328, height: 1328, steps: 50, cfg: 4, ...given };
  const first = {
    prompt: "", n: 1, seed: "", lock: false, width: usual.width, height: usual.height, steps: usual.steps, cfg: usual.cfg,
    negative: "", strength: "", layers: 4, loras: {},
  };
  values = { ...first, ...keptForm() };
  if (values.model !== about.model) Object.assign(values, { ...first, prompt: values.prompt, model: about.model });
  const sized = sizes(about.schedules);
  ratios = sized.length ? sized : RATIOS;
  fit();
  build();
  fill();
}

/** Only what can be drawn; whether that changed anything. */
function fit() {
  const { steps, width = values.width, height = values.height } = fitting(about.schedules, values) ?? values;
  const fits = values.steps === steps && values.width === width && values.height === height;
  Object.assign(values, { steps, width, height });
  return !fits;
}

function sizeOf(ratio) {
  if (ratio.includes("x")) return ratio.split("x").map(Number);
  if (usual.width === 1328 && usual.height === 1328) return TUNED[ratio];
  const [wide, high] = ratio.split(":").map(Number);
  const unit = Math.sqrt((usual.width * usual.height) / (wide * high));
  return [wide, high].map((side) => Math.max(16, Math.round((side * unit) / 16) * 16));
}

function set(name, value) {
  values[name] = value;
  fit();
  keepForm(values);
  fill();
}

function build() {
  show.ratio = choice($("ratios"), "ratio", ratios.map((ratio) => {
    const [wide, high] = ratio.split(/[:x]/).map(Number);
    const drawn = h("i", { class: "shape", "aria-hidden": "true" });
    drawn.style.aspectRatio = `${wide} / ${high}`;
    drawn.style[wide < high ? "height" : "width"] = "20px";
    return [ratio, ratio.replace("x", " × "), drawn];
  }), (ratio) => {
    [values.width, values.height] = sizeOf(ratio);
    set("ratio", ratio);
  });
  show.n = choice($("counts"), "n", [1, 2, 3, 4].map((n) => [n, String(n)]), (n) => set("n", n));
  for (const name of ["steps", "cfg", "strength", "layers"]) {
    $(name).oninput = () => set(name, Number($(name).value));
  }
  $("steps").max = Math.max(60, usual.steps * 2);
  for (const name of ["prompt", "negative"]) $(name).oninput = () => set(name, $(name).value);
  for (const name of ["width", "height"]) {
    $(name).onchange = () => {
      const side = Number($(name).value);
      set(name, side >= 16 ? Math.round(side / 16) * 16 : usual[name]);
    };
  }
  $("seed").oninput = () => {
    values.lock = $("seed").value.trim() !== "";
    set("seed", $("seed").value.replace(/\D/g, "").slice(0, 15));
  };
  $("lock").onclick = () => {
    if (!values.lock && values.seed === "") values.seed = String(randomSeed());
    set("lock", !values.lock);
  };
  $("loras-field").hidden = about.loras.length === 0;
  $("loras").replaceChildren(...about.loras.map((name, k) => {
    const on = h("input", { type: "checkbox", id: `lora-${k}`, name: "lora", value: name });
    const scale = h("input", { type: "range", min: 0, max: 2, step: 0.05, "aria-label": `Weight of ${name}` });
    const change = () => {
      const { [name]: _, ...others } = values.loras;
      set("loras", on.checked ? { ...others, [name]: Number(scale.value) } : others);
    };
    on.onchange = scale.oninput = change;
    return h("div", { class: "lora" }, on, h("label", { for: `lora-${k}` }, name), scale, h("output", { class: "value" }));
  }));
}

/** What kind of request the form makes now: its endpoint, and the fields that have an effect. */
export function kind() {
  const pictures = references?.list.length ?? 0;
  const masked = pictures === 1 && Boolean(references.list[0].mask);
  if (about.class === LAYERED) return { endpoint: "edits", layers: true, most: 1 };
  const most = about.class === TEXT || about.class === EDIT ? 1 : 3;
  if (!pictures) return { endpoint: "generations", size: true, most, canMask: true };
  if (about.class === TEXT && !masked) return { endpoint: "variations", strength: 0.6, most, canMask: true };
  return { endpoint: "edits", strength: masked ? (about.class === TEXT ? 0.6 : 1) : 0, most, canMask: pictures === 1, masked };
}

/** Show the values. */
export function fill() {
  const now = kind();
  for (const name of ["steps", "cfg", "layers"]) $(name).max = Math.max($(name).max, values[name]);
  for (const name of ["prompt", "negative", "steps", "cfg", "width", "height", "layers", "seed"]) {
    if (document.activeElement !== $(name) || $(name).type === "range") $(name).value = values[name];
  }
  $("strength").value = values.strength || now.strength || 1;
  for (const name of ["steps", "layers"]) $(`${name}-value`).value = $(name).value;
  $("cfg-value").value = values.cfg <= 1 ? "off" : Number(values.cfg).toFixed(1);
  $("strength-value").value = `${Math.round($("strength").value * 100)} %`;
  show.n(values.n);
  const ratio = ratios.find((r) => String(sizeOf(r)) === String([values.width, values.height]));
  show.ratio(ratio ?? "");
  $("size").value = `${values.width} × ${values.height}`;
  $("lock").setAttribute("aria-pressed", String(values.lock));
  $("ratio-field").hidden = !now.size;
  $("exact-field").hidden = !now.size || ratios !== RATIOS;
  $("strength-field").hidden = !now.strength;
  $("layers-field").hidden = !now.layers;
  $("negative-field").hidden = values.cfg <= 1;
  $("prompt-label").textContent = now.layers ? "What the picture shows" : now.endpoint === "edits" ? "What to change" : "Prompt";
  for (const row of $("loras").children) {
    const [on, , scale, shown] = row.children;
    const weight = values.loras[on.value];
    on.checked = weight !== undefined;
    scale.disabled = !on.checked;
    if (on.checked) scale.value = weight;
    else scale.value = 1;
    shown.value = Number(scale.value).toFixed(2);
  }
}

const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;

/** What is asked of the server now; the seed is chosen here where it is not kept, and shown. */
export function asked() {
  const now = kind();
  if (!values.lock || values.seed === "") {
    set("seed", String(randomSeed()));
    $("seed").value = values.seed;
  }
  const body = {
    prompt: values.prompt, n: values.n, seed: Number(values.seed), num_inference_steps: values.steps,
    true_cfg_scale: values.cfg, progress: true, output_format: "png",
  };
  const { lightning } = fitting(about.schedules, values) ?? {};
  if (lightning) {
    delete body.num_inference_steps;
    body.lightning = lightning;
  }
  if (now.size) body.size = `${values.width}x${values.height}`;
  if (now.strength) body.strength = Number($("strength").value);
  if (now.layers) Object.assign(body, { layers: values.layers });
  if (values.cfg > 1 && values.negative.trim()) body.negative_prompt = values.negative;
  const loras = Object.entries(values.loras).filter(([name]) => about.loras.includes(name));
  if (loras.length) body.lora = loras.map(([name, scale]) => ({ name, scale }));
  return { endpoint: now.endpoint, body };
}

export const prompt = () => values.prompt.trim();
export const usualPixels = () => usual.width * usual.height;

/** Take over what was asked before, or what a PNG says; returns what cannot be taken over. */
export function restore(from, { keepSeed = true } = {}) {
  const left = [];
  const take = (name, value) => { if (value !== undefined && value !== null) values[name] = value; };
  take("prompt", from.prompt);
  take("width", from.width);
  take("height", from.height);
  take("steps", from.steps ?? from.num_inference_steps);
  take("cfg", from.cfg ?? from.true_cfg_scale);
  values.strength = from.strength ?? "";
  take("layers", from.count ?? (from.kind ? undefined : from.layers));
  take("n", from.n);
  values.negative = (from.negative_prompt ?? "").trim();
  if (from.size && /^\d+x\d+$/.test(from.size)) [values.width, values.height] = from.size.split("x").map(Number);
  values.loras = {};
  for (const { name, scale } of from.lora ?? []) {
    if (about.loras.includes(name)) values.loras[name] = scale ?? 1;
    else left.push(`the LoRA ${name}`);
  }
  if (keepSeed && from.seed !== undefined) {
    values.seed = String(from.seed);
    values.lock = true;
  } else {
    values.lock = false;
    values.seed = "";
  }
  if (fit()) left.push("its schedule");
  keepForm(values);
  fill();
  $("prompt").value = values.prompt;
  return left;
}
