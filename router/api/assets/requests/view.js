// Who asked for what, and how it went: all requests, and each by itself.

import { element, list, number, plain, put, show } from "../drawing.js";
import { need } from "../known.js";
import { address, keepQuery } from "../routes.js";
import { askForDetails, drawDetails, openDetails, startDetails } from "./details.js";
import { asCsv, asJson, save } from "./export.js";
import { figuresIn } from "./figures.js";
import { refresh, requests } from "./known.js";
import { arrange, drawTable, found, startTable, wanted } from "./table.js";

let drawFigures;
let showOutcomes;
let showsOne = false;

export const view = {
  name: "requests",
  title: "Requests",
  start() {
    drawFigures = figuresIn(element("all-figure-rows"), element("all-since-start"));
    startTable((sort) => want({ sort }));
    startDetails();
    showOutcomes = list(
      element("request-outcome"),
      plain("option"),
      ([value]) => value,
      ({ root }, [value, text]) => {
        put(root, text);
        put(root, value, "value"); // after its text, which is its value as long as it has none
      },
    );
    element("request-filter").addEventListener("input", ({ target }) => want({ q: target.value }));
    element("request-outcome").addEventListener("change", ({ target }) => want({ outcome: target.value }));
    for (const name of ["model", "client"]) {
      element(`only-${name}`).addEventListener("click", () => want({ [name]: "" }));
    }
    element("save-csv").addEventListener("click", () => save("requests.csv", "text/csv", asCsv(all())));
    element("save-json").addEventListener("click", () => save("requests.json", "application/json", asJson(all())));
  },
  show(path, query) {
    showsOne = path.length > 0;
    show(element("request-list"), !showsOne);
    show(element("request-details"), showsOne);
    if (showsOne) {
      const id = path.join("/");
      openDetails(id);
      return `Request ${id}`;
    }
    for (const name in wanted) wanted[name] = query.get(name) ?? "";
    put(element("request-filter"), wanted.q, "value");
    arrange();
    return this.title;
  },
  draw(known) {
    if (showsOne) {
      drawDetails();
      return;
    }
    drawOutcomes();
    drawTable();
    drawFigures(known);
    const { capture } = requests;
    show(element("capture-on"), capture);
    const last = capture === 1 ? "request" : `${number(capture)} requests`;
    put(
      element("capture-on"),
      `What is asked and answered is kept in memory, of the last ${last}: full keys may read it (system.capture).`,
    );
    for (const name of ["model", "client"]) {
      show(element(`only-${name}`), wanted[name]);
      put(element(`only-${name}`), `${name}: ${wanted[name]} ×`);
      put(element(`only-${name}`), `Show all, not only ${name} ${wanted[name]}`, "ariaLabel");
    }
  },
  async ask() {
    if (showsOne) await askForDetails();
    else {
      await refresh();
      await need("telemetry");
    }
  },
};

/** Changes what is shown, and its address. */
function want(change) {
  Object.assign(wanted, change);
  keepQuery(wanted);
  element("all-requests").href = address("requests", [], wanted);
  arrange();
}

const all = () => {
  const { live, ended } = found();
  return [...live, ...ended];
};

function drawOutcomes() {
  const outcomes = new Set(requests.ended.map(({ outcome }) => outcome));
  if (wanted.outcome && !["live", "failed"].includes(wanted.outcome)) outcomes.add(wanted.outcome);
  const words = [...outcomes].sort().map((outcome) => [outcome, outcome.replaceAll("_", " ")]);
  showOutcomes([["", "all outcomes"], ["live", "in flight"], ["failed", "not served"], ...words]);
  put(element("request-outcome"), wanted.outcome, "value");
}
