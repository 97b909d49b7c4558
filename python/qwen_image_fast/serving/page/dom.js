// Small helpers for elements: no framework, no inline styles, so that a strict Content-Security-Policy holds.

export const $ = (id) => document.getElementById(id);

/** An element: h("button", {class: "quiet", onclick: f, "aria-label": "Close"}, "text", child). */
export function h(tag, given = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Buttons of which one is chosen. `choices`: [value, label, node or null]. Returns a setter. */
export function choice(parent, name, choices, onchange) {
  parent.replaceChildren(
    ...choices.map(([value, label, drawn]) => {
      const input = h("input", { type: "radio", name, value, class: "hidden", "aria-label": drawn ? label : null });
      input.addEventListener("change", () => onchange(value));
      return h("label", { class: "choice", title: drawn ? label : null }, input, ...(drawn ? [drawn] : []), h("span", {}, label));
    }),
  );
  return (value) => {
    for (const input of parent.querySelectorAll("input")) input.checked = input.value === String(value);
  };
}

/** A sentence that goes away by itself; `action`: [label, function]. */
export function toast(text, { bad = false, action = null } = {}) {
  const node = h("div", { class: bad ? "toast bad" : "toast" }, h("p", {}, text));
  if (action) node.append(h("button", { type: "button", class: "quiet", onclick: () => { action[1](); node.remove(); } }, action[0]));
  node.append(h("button", { type: "button", class: "quiet icon", "aria-label": "Close", onclick: () => node.remove() }, "×"));
  $("toasts").append(node);
  setTimeout(() => node.remove(), bad ? 12000 : 7000);
}

export function bytesOf(base64) {
  const text = atob(base64);
  const found = new Uint8Array(text.length);
  for (let k = 0; k < text.length; k++) found[k] = text.charCodeAt(k);
  return found;
}

const urls = new WeakMap();

/** An address of a blob, one for each blob. */
export function urlOf(blob) {
  if (!urls.has(blob)) urls.set(blob, URL.createObjectURL(blob));
  return urls.get(blob);
}

export function seconds(value) {
  if (value < 90) return `${Math.max(1, Math.round(value))} s`;
  return `${Math.round(value / 60)} min`;
}
