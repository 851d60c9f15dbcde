// How things are drawn. Elements are kept and patched, so that focus, selection and scrolling survive every update;
// whatever the router tells goes in as text, never as HTML.

export const element = (id) => document.getElementById(id);

/** Sets its text, or another property. What stays the same costs nothing. */
export function put(node, value, property = "textContent") {
  if (node[property] !== value) node[property] = value;
}
export const show = (node, visible) => put(node, !visible, "hidden");

/** What a template holds, and its elements that have a name. */
export function stamp(id) {
  const root = element(id).content.firstElementChild.cloneNode(true);
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

/** Of a row's list, which is made with the row. */
export function lists(make, keyOf, fill) {
  const made = new WeakMap();
  return (parent, items) => {
    if (!made.has(parent)) made.set(parent, list(parent, make, keyOf, fill));
    made.get(parent)(items);
  };
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
