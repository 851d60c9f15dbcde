// A lane for each model that did something in the last minutes: its states, and its requests within them.

import { duration, element, list, number, put, show } from "../drawing.js";
import { addressOf } from "../routes.js";
import { explore } from "./explore.js";
import { clock, most, past } from "./past.js";
import { area, HEIGHT, lasting, mark, picture, place, set, shape, share } from "./pictures.js";

const FEW = 12;

let showsAll = false;
let order = [];
let redraw = () => {};

const showLanes = list(
  element("lanes"),
  makeLane,
  ([alias]) => alias,
  fillLane,
);

export function drawLanes(known) {
  redraw = () => drawLanes(known);
  const lanes = inOrder();
  const shown = showsAll ? lanes : lanes.slice(0, FEW);
  const others = lanes.length - FEW;
  showLanes(shown.map(([alias, lane]) => [alias, lane, known.models.get(alias)]));
  const more = element("more-lanes");
  show(more, others > 0);
  put(more, showsAll ? "fewer" : `and ${number(others)} more`);
  put(more, String(showsAll), "ariaExpanded");
  if (element("lane-table").open) drawTable(lanes);
  drawAxis();
}

function drawAxis() {
  const lasts = past.to - past.from;
  const [first, ...others] = [lasts, (2 * lasts) / 3, lasts / 3].map(duration);
  [`${first} ago`, ...others, "now"].forEach((text, index) => put(element("lane-axis").children[index], text));
}

/** The most recently loaded first, but no lane moves under a pointer or from the focus. */
function inOrder() {
  const place = element("lanes");
  const lanes = [...past.lanes].sort((one, other) => recent(other[1]) - recent(one[1]));
  if (place.matches(":hover, :focus-within")) {
    const position = new Map(order.map((alias, index) => [alias, index]));
    const of = ([alias]) => position.get(alias) ?? order.length;
    lanes.sort((one, other) => of(one) - of(other));
  }
  order = lanes.map(([alias]) => alias);
  return lanes;
}

/** When it was last loaded, failed or waited for. */
function recent({ spans, queued }) {
  const began = spans.filter(({ state }) => ["loading", "failed"].includes(state)).at(-1)?.from ?? 0;
  return Math.max(began, queued.findLast(([, waiting]) => waiting)?.[0] ?? 0);
}

function makeLane([alias]) {
  const root = document.createElement("li");
  const name = root.appendChild(document.createElement("a"));
  name.textContent = name.title = alias;
  name.href = addressOf(alias);
  const track = root.appendChild(document.createElement("div"));
  track.className = "track";
  track.tabIndex = 0;
  track.role = "slider";
  track.ariaLabel = `${alias}: its states in the last minutes`;
  const svg = track.appendChild(picture());
  const states = svg.appendChild(shape("g"));
  const served = svg.appendChild(shape("path", "served"));
  const waited = svg.appendChild(shape("path", "waited"));
  const cursor = svg.appendChild(shape("rect", "cursor"));
  const showStates = list(
    states,
    () => ({ root: shape("rect") }),
    (span) => span.from,
    ({ root: rect }, { state, from, to }) =>
      set(rect, { class: `state-${state}`, ...place(from, to ?? past.to), height: HEIGHT }),
  );
  return { root, track, served, waited, cursor, showStates };
}

function fillLane({ track, served, waited, cursor, showStates }, [alias, lane, model]) {
  const { spans, in_flight, queued } = lane;
  const scale = Math.max(1, model?.slots ?? 1, most(in_flight, past.from, past.to));
  showStates(spans.filter(({ state }) => state !== "off"));
  set(served, { d: area(whileServing(lasting(in_flight), spans), scale) });
  set(waited, { d: area(lasting(queued), Math.max(4, most(queued, past.from, past.to)), { hangs: true }) });
  const items = parts(lane).map((part) => ({
    key: part.from,
    from: share(part.from),
    to: share(part.to ?? past.to),
    text: inWords(alias, part, lane),
  }));
  explore(track, items, (item) => {
    mark(cursor, item);
    put(element("lane-note"), item?.text ?? "");
  });
}

const SERVES = new Set(["ready", "draining"]);

/** Numbers are of whole steps of the router; of these, the parts in which the model did serve. */
function whileServing(numbers, spans) {
  const serving = spans.filter(({ state }) => SERVES.has(state));
  return numbers.flatMap(([from, number, until]) =>
    serving
      .map((span) => [Math.max(from, span.from), number, Math.min(until, span.to ?? past.to)])
      .filter(([begin, , end]) => begin < end),
  );
}

/** Its states, and before the first of them the time for which it was waited for. */
function parts({ spans, queued }) {
  const [first] = spans;
  const waited = queued[0]?.[0];
  if (waited === undefined || (first && first.from <= waited)) return spans;
  return [{ state: "awaited", from: waited, to: first?.from ?? null, reason: "" }, ...spans];
}

function inWords(alias, { state, from, to, reason }, { in_flight, queued }) {
  const end = to ?? past.to;
  const requests = [
    [SERVES.has(state) ? most(in_flight, from, end) : 0, "in flight"],
    [most(queued, from, end), "waiting"],
  ]
    .filter(([count]) => count)
    .map(([count, what]) => `${count < 1 ? "less than 1" : `up to ${number(Math.round(count))}`} ${what}`);
  const begin = from <= past.from ? "since before" : `from ${clock(from)}`;
  const told = [
    `${alias} ${state} ${begin} ${to === null ? "until now" : `to ${clock(to)}`}`,
    `(${duration(end - from)})`,
    reason && `: ${reason}`,
    requests.length > 0 && `; ${requests.join(", ")}`,
  ];
  return told.filter(Boolean).join(" ").replaceAll(" :", ":").replaceAll(" ;", ";");
}

// --- the same as a table -------------------------------------------------------------------------------------

const MOST_ROWS = 200;

const showRows = list(
  element("lane-rows"),
  () => {
    const root = document.createElement("tr");
    const name = root.appendChild(document.createElement("th"));
    name.scope = "row";
    return { root, cells: [name, ...[1, 2, 3, 4].map(() => root.appendChild(document.createElement("td")))] };
  },
  ({ alias, from }) => `${from} ${alias}`,
  ({ cells }, { alias, state, from, to, reason }) => {
    const lasted = `${duration((to ?? past.to) - from)}${to === null ? ", still" : ""}`;
    [alias, state, clock(from), lasted, reason].forEach((text, index) => put(cells[index], text));
  },
);

function drawTable(lanes) {
  const rows = lanes.flatMap(([alias, { spans }]) => spans.map((span) => ({ alias, ...span })));
  showRows(rows.sort((one, other) => other.from - one.from).slice(0, MOST_ROWS));
}

export function startLanes() {
  element("more-lanes").addEventListener("click", () => {
    showsAll = !showsAll;
    redraw();
  });
  element("lane-table").addEventListener("toggle", () => redraw());
}
