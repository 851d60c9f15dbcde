// The list of all models; pulls of further ones; and what was found but is not served.

import { counted, element, list, matches, number, plain, put, show } from "../drawing.js";
import { changed, isRunning, known, need, outdate, waitsForLoad } from "../known.js";
import { keepQuery } from "../routes.js";
import { drawPulls, startPulls } from "./pulls.js";
import { held, rowsOf } from "./rows.js";

const AT_ONCE = 100; // so many rows more are drawn when one comes to the end
const RANK = { failed: 0, loading: 1, draining: 1, stopping: 1, ready: 1, asleep: 2, off: 3 };
const rank = (model) => (isAskedFor(model) ? RANK.asleep : RANK[model.status]);
const isAskedFor = (model) =>
  model.status === "off" && (waitsForLoad(model) || known.queue?.per_model[model.alias]?.queue_length > 0);
const ORDERS = {
  "": (one, other) => rank(one) - rank(other),
  name: (one, other) => one.alias.localeCompare(other.alias, "en", { numeric: true }),
  used: (one, other) => (other.last_used_at ?? "").localeCompare(one.last_used_at ?? ""),
};

let showRows;
let showFound;
let inOrder;
let drawn = AT_ONCE;

export function startList() {
  const rows = element("model-rows");
  showRows = rowsOf(rows);
  inOrder = held(rows);
  showFound = list(
    element("found-rows"),
    plain("li"),
    ({ what }) => what,
    ({ root }, { what, reason }) => {
      if (root.children.length) return;
      root.append(document.createElement("b"), ": ", document.createElement("span"));
      root.firstElementChild.textContent = what;
      root.lastElementChild.textContent = reason;
    },
  );
  startPulls();
  const ask = () => {
    drawn = AT_ONCE;
    keepQuery({ q: element("filter").value, order: element("model-order").value });
    changed();
  };
  element("filter").addEventListener("input", ask);
  element("model-order").addEventListener("change", ask);
  const drawMore = () => {
    drawn += AT_ONCE;
    changed();
  };
  element("more-models").addEventListener("click", drawMore);
  new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && drawMore(), {
    rootMargin: "400px",
  }).observe(element("more-models"));
}

export function showList(query) {
  put(element("filter"), query.get("q") ?? "", "value");
  put(element("model-order"), query.get("order") ?? "", "value");
  drawn = AT_ONCE;
}

export function drawList(known) {
  const models = [...known.models.values()];
  const wanted = element("filter").value.trim();
  const order = ORDERS[element("model-order").value];
  let shown = inOrder(models.sort(order));
  if (wanted) {
    shown = shown.filter(({ alias, status, source }) =>
      matches(wanted, [alias, status, source, known.cards.get(alias)?.description, ...(known.names.get(alias) ?? [])]),
    );
  }
  showRows(shown.slice(0, drawn), known);
  const left = shown.length - drawn;
  put(element("more-models"), `Show more of ${number(Math.max(left, 0))} others`);
  show(element("more-models"), left > 0);
  const states = {};
  for (const { status } of models) states[status] = (states[status] ?? 0) + 1;
  put(element("counts"), counted(states));
  put(element("matched"), wanted ? `${number(shown.length)} of ${number(models.length)} match` : "");
  put(
    element("no-models"),
    models.length
      ? "No model matches the filter."
      : "No models are configured: start the router with --models-dir, name some in its configuration, or pull one.",
  );
  show(element("no-models"), !shown.length);
  show(element("model-table"), shown.length);
  drawPulls(known);
  drawFound(known);
}

function drawFound({ found }) {
  show(element("found"), found?.not_served.length || found?.folders.length);
  if (!found) return;
  const { folders, not_served: lost } = found;
  put(element("found-count"), lost.length ? number(lost.length) : "nothing");
  showFound(lost);
  put(element("found-folders"), folders.length ? `Looked in ${folders.map(({ path }) => path).join(", ")}` : "");
}

export async function needForList(known) {
  if (known.pulls.some(isRunning)) outdate("pulls");
  await need("vram", "pulls", "found");
}
