// The list of requests: live ones first, then those that have ended. Rows do not move while somebody points at one of
// them or has the focus in one: it holds still, and says so.

import { allow, element, link, list, matches, number, put, show } from "../drawing.js";
import { changed } from "../known.js";
import { address } from "../routes.js";
import { COLUMNS, sorted } from "./columns.js";
import { cancel, pending } from "./commands.js";
import { isLive, outcomeOf, progress, requests } from "./known.js";

const AT_ONCE = 50;

/** What is shown: `words`, `outcome`, `model` and `client` restrict it, `sort` orders it. */
export const wanted = { q: "", outcome: "", model: "", client: "", sort: "" };

let rows = { live: [], ended: [] }; // as they are shown
let atMost = AT_ONCE;
let arrangedFor = null; // the answer that they were arranged for
let isHeld = false;
let showLive;
let showEnded;

export function startTable(sort) {
  const head = element("request-head");
  for (const { name, label, title = "", isFigure } of COLUMNS) {
    const button = document.createElement("button");
    Object.assign(button, { type: "button", textContent: label, title });
    button.addEventListener("click", () => sort(next(name)));
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.className = `column-${name} ${isFigure ? "figure" : ""}`;
    cell.append(button);
    head.append(cell);
  }
  const last = head.appendChild(document.createElement("th"));
  last.scope = "col";
  last.append(Object.assign(document.createElement("span"), { className: "unseen", textContent: "Action" }));
  showLive = list(element("live-rows"), make, ({ key }) => key, fill);
  showEnded = list(element("ended-rows"), make, ({ key }) => key, fill);
  const table = element("request-table");
  for (const body of table.tBodies) {
    body.addEventListener("pointerenter", look);
    body.addEventListener("pointerleave", look);
    body.addEventListener("focusin", look);
    body.addEventListener("focusout", look);
  }
  table.addEventListener("click", ({ target }) => {
    const button = target.closest("td button");
    if (button) cancel(button.dataset.id);
  });
  element("more-requests").addEventListener("click", () => {
    atMost += AT_ONCE;
    changed();
  });
}

/** A column that is pressed: as it is mostly wanted, then the other way round, then as they came. */
function next(name) {
  const [first, second] = COLUMNS.find((column) => column.name === name).isFigure || name === "arrived" ? [`-${name}`, name] : [name, `-${name}`];
  if (wanted.sort === first) return second;
  return wanted.sort === second ? "" : first;
}

function look({ type, relatedTarget, currentTarget }) {
  const isWithin = relatedTarget && currentTarget.contains(relatedTarget);
  if (type === "focusout" && isWithin) return;
  requestAnimationFrame(() => {
    const bodies = [...element("request-table").tBodies];
    const held = bodies.some((body) => body.matches(":hover") || body.contains(document.activeElement));
    if (held === isHeld) return;
    isHeld = held;
    changed();
  });
}

/** Those that are to be shown, in their order. */
export function found() {
  const { q, outcome, model, client, sort } = wanted;
  const isWanted = (request) =>
    (!model || request.model === model) &&
    (!client || request.client === client) &&
    (!outcome || isOf(request, outcome)) &&
    (!q || matches(q, [request.words]));
  return { live: sorted(requests.live.filter(isWanted), sort), ended: sorted(requests.ended.filter(isWanted), sort) };
}

function isOf(request, outcome) {
  if (outcome === "live") return isLive(request);
  if (outcome === "failed") return !isLive(request) && !["served", "cancelled"].includes(request.outcome);
  return request.outcome === outcome;
}

/** Somebody wants something else: it is arranged anew, also while it holds still. */
export function arrange() {
  arrangedFor = null;
  atMost = AT_ONCE;
  changed();
}

export function drawTable() {
  let news = 0;
  if (arrangedFor === null || (arrangedFor !== requests.seenAt && !isHeld)) {
    rows = found();
    arrangedFor = requests.seenAt;
  } else {
    const byKey = new Map([...requests.ended, ...requests.live].map((request) => [request.key, request]));
    const asTheyAre = (request) => byKey.get(request.key) ?? request;
    rows = { live: rows.live.map(asTheyAre), ended: rows.ended.map(asTheyAre) };
    if (isHeld) {
      const known = new Set([...rows.live, ...rows.ended].map(({ key }) => key));
      const now = found();
      news = [...now.live, ...now.ended].filter(({ key }) => !known.has(key)).length;
    }
  }
  const live = rows.live.slice(0, atMost);
  const ended = rows.ended.slice(0, Math.max(0, atMost - live.length));
  showLive(live);
  showEnded(ended);
  drawAround(live.length + ended.length, news);
}

function drawAround(shown, news) {
  const { live, ended } = rows;
  const count = live.length + ended.length;
  const all = requests.live.length + requests.ended.length;
  const some = count < all ? `${number(count)} of ${number(all)}` : number(all);
  put(element("request-counts"), requests.seenAt ? `${some} · ${number(requests.live.length)} in flight` : "");
  put(element("held"), isHeld ? `holds still while you are in it${news ? `; ${number(news)} more` : ""}` : "");
  show(element("request-table"), count);
  show(element("more-requests"), shown < count);
  put(element("more-requests"), `Show ${number(Math.min(AT_ONCE, count - shown))} more of ${number(count)}`);
  show(element("no-requests"), requests.seenAt && !count);
  const none = requests.kept
    ? "No requests yet."
    : "Nothing is in flight. The router keeps no requests that have ended (system.requests_kept).";
  put(element("no-requests"), all ? "No request matches the filter." : none);
  element("request-head")
    .querySelectorAll("th")
    .forEach((cell, index) => {
      const { name } = COLUMNS[index] ?? {};
      const isBy = name && wanted.sort.replace(/^-/, "") === name;
      put(cell, isBy ? (wanted.sort.startsWith("-") ? "descending" : "ascending") : null, "ariaSort");
    });
}

function make() {
  const root = document.createElement("tr");
  const cells = {};
  for (const { name, isFigure } of COLUMNS) {
    const cell = root.appendChild(document.createElement(name === "id" ? "th" : "td"));
    if (name === "id") cell.scope = "row";
    cell.className = `column-${name} ${isFigure ? "figure" : ""}`;
    cells[name] = cell;
  }
  const name = cells.id.appendChild(document.createElement("a"));
  name.dataset.part = "name";
  const state = cells.outcome.appendChild(document.createElement("span"));
  state.className = "outcome";
  const progress = cells.outcome.appendChild(document.createElement("small"));
  const button = document.createElement("button");
  Object.assign(button, { type: "button", textContent: "Cancel" });
  button.dataset.part = "cancel";
  root.appendChild(document.createElement("td")).append(button);
  return { root, cells, name, state, progress, button };
}

function fill({ root, cells, name, state, progress: beside, button }, request) {
  for (const column of COLUMNS) {
    if (column.text) put(cells[column.name], column.text(request));
  }
  const { id } = request;
  put(root.dataset, request.outcome ?? request.state, "outcome");
  put(name, id);
  put(name, id, "title");
  link(name, address("requests", [id]));
  put(state, outcomeOf(request) + (request.status && request.status !== 200 ? ` ${request.status}` : ""));
  put(beside, progress(request));
  put(button.dataset, id, "id");
  put(button, `Cancel request ${id}`, "ariaLabel");
  allow(button, !pending.has(id));
  if (!isLive(request) && document.activeElement === button) name.focus({ preventScroll: true });
  show(button, isLive(request));
}
