// Elements of the chat, and how they get onto the page. Whatever people or models say goes in as text.

/** An element. Of its properties, those with functions are listeners, and all others attributes; false is none. */
export function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== false && value !== undefined && value !== null)
      node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export const button = (text, click, properties = {}) =>
  make("button", { type: "button", click, ...properties }, text);

/** A field with its label before it. */
export const labelled = (text, field, hint) =>
  make("label", {}, make("span", {}, text), field, hint ? make("small", {}, hint) : null);

/** Makes `nodes` the children of `parent`; those that are there already are not touched, nor is the focus. */
export function arrange(parent, nodes) {
  const wanted = new Set(nodes);
  for (const child of [...parent.children]) if (!wanted.has(child)) child.remove();
  let next = parent.firstElementChild;
  for (const node of nodes) {
    if (node === next) next = next.nextElementSibling;
    else parent.insertBefore(node, next);
  }
}

/** Changes what is in a box, and stays at its end if that was in view. */
export function stayAtEnd(box, change) {
  const wasThere = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
  change();
  if (wasThere) box.scrollTop = box.scrollHeight;
}

/** Puts a text on the clipboard. Browsers have its interface over HTTPS and on this machine only. */
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const focused = document.activeElement;
  const field = make("textarea", { class: "unseen", "aria-hidden": "true" });
  field.value = text;
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
  focused?.focus({ preventScroll: true });
}

/** A button that copies what `text` returns, and says so. */
export function copier(text, properties = {}) {
  const pressed = async ({ currentTarget: it }) => {
    await copy(text());
    it.textContent = "Copied";
    setTimeout(() => (it.textContent = "Copy"), 1500);
  };
  return button("Copy", pressed, { class: "quiet", ...properties });
}

/** Hands a file to the browser's downloads. */
export function download(name, content, type) {
  const url = URL.createObjectURL(new Blob([content], { type }));
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

/** An identity that nobody else has. `crypto.randomUUID` is there over HTTPS only. */
export function identity(prefix) {
  const random = crypto.getRandomValues(new Uint8Array(9));
  return `${prefix}-${[...random].map((byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}
