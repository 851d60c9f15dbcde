// The views of the page and their addresses: `#/NAME/PATH?QUERY`. Only the view that is shown is loaded, asked and
// drawn. A view is what its folder's view.js exports:
//
//   name, title
//   start(root)        once, when it is first shown; `root` is its section
//   show(path, query)  when its address is entered or changes: the decoded segments after the name, URLSearchParams;
//                      may return a title of its own, and may move the focus
//   hide()             when another view is shown
//   draw(known)        when something has changed, and it is shown
//   ask(known)         what it alone asks of the router, in each look

import { element, focusOn } from "./drawing.js";

const NAMES = ["overview", "requests", "chat", "models", "logs", "settings"];
const started = new Map();

/** The view that is shown, once it has been loaded. */
export let shown = null;

export function parsed(hash = location.hash) {
  const [path, query = ""] = hash.replace(/^#\/?/, "").split(/\?(.*)/s);
  const [name, ...rest] = path.split("/").map(decoded);
  const known = NAMES.includes(name);
  return { name: known ? name : "overview", path: known ? rest : [], query: new URLSearchParams(query) };
}

function decoded(segment) {
  try {
    return decodeURIComponent(segment);
  } catch {
    return segment;
  }
}

/** The address of a view; `path` is what its segments say. */
export function address(name, path = [], query = {}) {
  const asked = new URLSearchParams(Object.entries(query).filter(([, value]) => value)).toString();
  const segments = [name === "overview" ? "" : name, ...path].map(encodeURIComponent).join("/");
  return `#/${segments}${asked && `?${asked}`}`;
}

/** The address of a model's page, or another view's of a model. */
export const addressOf = (alias, view = "models") => address(view, alias.split("/"));

/** Puts a view's state (a filter) into its address, without a step back in the history. */
export function keepQuery(query) {
  const { name, path } = parsed();
  history.replaceState(null, "", address(name, path, query));
}

let entered = 0;
let before = null; // the address that was shown

/** Shows what the address names. `failed` is told of a view that could not be loaded. */
export async function enter(failed) {
  const { name, path, query } = parsed();
  const entry = (entered += 1);
  for (const link of document.querySelectorAll("nav a[data-view]")) {
    link.ariaCurrent = link.dataset.view === name ? "page" : null;
  }
  let view = started.get(name);
  if (!view) {
    try {
      ({ view } = await import(`./${name}/view.js`));
    } catch (error) {
      if (entry === entered) failed(error);
      return;
    }
    if (entry !== entered) return; // somebody has gone on meanwhile
  }
  const root = element(`view-${name}`);
  if (!started.has(name)) {
    started.set(name, view);
    view.start?.(root);
  }
  if (shown !== view) {
    shown?.hide?.();
    for (const other of document.querySelectorAll(".view")) other.hidden = other !== root;
    shown = view;
  }
  const focused = document.activeElement;
  const title = view.show?.(path, query) ?? view.title;
  document.title = `${title} · llama-router`;
  const place = [name, ...path].join("/");
  if (before !== null && before !== place && !hasMoved(focused)) {
    const heading = [...root.querySelectorAll("h2")].find((each) => each.checkVisibility());
    if (heading) focusOn(heading);
    scrollTo(0, 0);
  }
  before = place;
}

/** Whether the view has put the focus where it wants it. */
function hasMoved(focused) {
  const { activeElement: now, body } = document;
  return now !== focused && now !== body && now.checkVisibility() && !now.matches("h1, h2, h3");
}
