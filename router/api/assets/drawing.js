// How things are drawn. Elements are kept and patched, so that focus, selection and scrolling survive every update;
// whatever the router tells goes in as text, never as HTML.

export const element = (id) => document.getElementById(id);

/** Sets its text, or another property. What stays the same costs nothing. */
export function put(node, value, property = "textContent") {
  if (node[property] !== value) node[property] = value;
}

export function link(node, address) {
  if (node.getAttribute("href") !== address) node.setAttribute("href", address);
}

/** Shows or hides it. Focus within what is hidden goes to the heading above it. */
export function show(node, visible) {
  const hidden = !visible;
  if (node.hidden === hidden) return;
  if (hidden && node.contains(document.activeElement)) focusHeading(node);
  node.hidden = hidden;
}

/** The heading of what a node is part of, or else of the view. */
function focusHeading(node) {
  const headings = [...document.querySelectorAll("h1, h2, h3")].filter(
    (heading) => heading.checkVisibility() && !node.contains(heading),
  );
  const above = headings.filter(
    (heading) => heading.compareDocumentPosition(node) & Node.DOCUMENT_POSITION_FOLLOWING,
  );
  focusOn(above.at(-1) ?? headings[0]);
}

export function focusOn(heading) {
  heading.tabIndex = -1;
  heading.focus({ preventScroll: true });
}

/**
 * Lets a button be pressed, or not just now. It keeps the focus either way, unlike a disabled one; what a press of it
 * would do is not done (see `stopPresses`).
 */
export const allow = (button, allowed) => put(button, allowed ? null : "true", "ariaDisabled");

/** Once for the page: no press of a button that cannot be pressed just now reaches it. */
export function stopPresses() {
  const stop = (event) => {
    if (!event.target.closest?.("[aria-disabled=true]")) return;
    event.preventDefault();
    event.stopImmediatePropagation();
  };
  document.addEventListener("click", stop, { capture: true });
}

const ANNOUNCED_MS = 1_000;
const MOST_ANNOUNCED = 3;
let toAnnounce = [];

/** Tells those who do not see the page what has changed, once the page's reader has nothing else to say. */
export function announce(text) {
  if (toAnnounce.push(text) > 1) return;
  setTimeout(() => {
    const more = toAnnounce.length - MOST_ANNOUNCED;
    const told = toAnnounce.slice(0, MOST_ANNOUNCED);
    element("announcer").textContent = [...told, more > 0 && `and ${more} more changes`].filter(Boolean).join("; ");
    toAnnounce = [];
  }, ANNOUNCED_MS);
}

const words = (text) => text.toLowerCase().replaceAll(/[-_./:\s]+/g, " ");

/** Whether each word is in one of the texts: `gemma 4b` is in gemma-3-4b. */
export function matches(wanted, texts) {
  const within = texts.map((text) => words(text ?? ""));
  return words(wanted)
    .trim()
    .split(" ")
    .every((word) => within.some((text) => text.includes(word)));
}

/** What a template holds, and its elements that have a name. */
export function stamp(id) {
  const root = document.importNode(element(id).content.firstElementChild, true);
  const parts = Object.fromEntries(
    [...root.querySelectorAll("[data-part]")].map((node) => [node.dataset.part, node]),
  );
  return { root, ...parts };
}

export const plain = (tag) => () => ({ root: document.createElement(tag) });

/** Makes the children of `parent` those of `items`, in their order; the returned function is called with them. */
export function list(parent, make, keyOf, fill) {
  const kept = new Map();
  return (items) => {
    const focused = document.activeElement;
    const keys = new Set(items.map(keyOf));
    for (const [key, { root }] of kept) {
      if (!keys.has(key)) {
        if (root.contains(focused)) focusBeside(root, keys.size);
        root.remove();
        kept.delete(key);
      }
    }
    let next = parent.firstElementChild;
    for (const item of items) {
      const key = keyOf(item);
      if (!kept.has(key)) kept.set(key, make(item));
      const parts = kept.get(key);
      fill(parts, item);
      if (parts.root === next) next = next.nextElementSibling;
      else parent.insertBefore(parts.root, next);
    }
    if (focused !== document.activeElement && parent.contains(focused)) focused.focus({ preventScroll: true });
  };
}

/** When a row with focus goes: the same part of its neighbour has it next. */
function focusBeside(row, left) {
  const { part } = document.activeElement.dataset;
  const beside = left ? (row.nextElementSibling ?? row.previousElementSibling) : null;
  const next = part && beside?.querySelector(`[data-part="${part}"]`);
  if (next && next.checkVisibility()) next.focus({ preventScroll: true });
  else focusHeading(row);
}

/** Of a row's list, which is made with the row. */
export function lists(make, keyOf, fill) {
  const made = new WeakMap();
  return (parent, items) => {
    if (!made.has(parent)) made.set(parent, list(parent, make, keyOf, fill));
    made.get(parent)(items);
  };
}

/** The texts of a row's cells. */
export function putCells(row, texts) {
  while (row.children.length < texts.length) row.append(document.createElement("td"));
  texts.forEach((text, index) => put(row.children[index], text));
}

const showFacts = lists(
  () => stamp("fact"),
  ([name]) => name,
  (row, [name, value, title = ""]) => {
    put(row.name, name);
    put(row.value, value);
    put(row.value, title, "title");
  },
);

/** Names and values in a <dl>, without those whose value is empty. */
export const putFacts = (parent, facts) => showFacts(parent, facts.filter(([, value]) => value));

/** Copies a text, and says so on the button for a moment. */
export async function copy(text, button) {
  const said = button.textContent;
  let told = "Copied";
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    told = copiedAsBefore(text) ? "Copied" : "Not copied";
  }
  announce(told);
  put(button, told);
  setTimeout(() => button.textContent === told && put(button, said), 1500);
}

/** Without HTTPS, browsers have no other way. */
function copiedAsBefore(text) {
  const field = document.createElement("textarea");
  const focused = document.activeElement;
  field.value = text;
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  focused.focus({ preventScroll: true });
  return done;
}

// --- words ---------------------------------------------------------------------------------------------------

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 0.9995) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  const two = (number) => String(number).padStart(2, "0");
  if (whole < 3600) return `${Math.floor(whole / 60)}m${two(whole % 60)}s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)}h${two(Math.floor((whole % 3600) / 60))}m`;
  return `${Math.floor(whole / 86400)}d${two(Math.floor((whole % 86400) / 3600))}h`;
}

export const size = (mib) => (mib < 1000 ? `${Math.round(mib)} MiB` : `${(mib / 1024).toFixed(1)} GiB`);
export const bytes = (count) => (count < 1e6 ? `${Math.ceil(count / 1024)} KiB` : size(count / 2 ** 20));
export const number = (count) => count.toLocaleString("en");
export const tokens = (count) => (count < 1024 ? `${count}` : `${Math.round(count / 1024)}k`);
export const ago = (milliseconds) => (performance.now() - milliseconds) / 1000;
export const secondsBetween = (from, to) => (new Date(to) - new Date(from)) / 1000;
export const counted = (counts) =>
  Object.entries(counts)
    .filter(([, count]) => count)
    .map(([name, count]) => `${number(count)} ${name}`)
    .join(", ");

/** A mean over some seconds. */
export const perSec = (count, seconds) => (count / seconds).toFixed(count / seconds < 100 ? 1 : 0);
