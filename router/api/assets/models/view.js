// All models that the router serves.

import { counted, element, matches, put, show } from "../drawing.js";
import { changed, isRunning, need, outdate } from "../known.js";
import { keepQuery } from "../routes.js";
import { drawPulls, startPulls } from "./pulls.js";
import { rowsOf } from "./rows.js";

const RANK = { failed: 0, loading: 1, draining: 1, stopping: 1, ready: 1, asleep: 2, off: 3 };

let showRows;

export const view = {
  name: "models",
  title: "Models",
  start() {
    showRows = rowsOf(element("model-rows"));
    startPulls();
    element("filter").addEventListener("input", ({ target }) => {
      keepQuery({ q: target.value });
      changed();
    });
  },
  show(path, query) {
    put(element("filter"), query.get("q") ?? "", "value");
  },
  draw(known) {
    const models = [...known.models.values()];
    const wanted = element("filter").value;
    const shown = models.filter((model) =>
      matches(wanted, [model.alias, model.status, model.source, ...(known.names.get(model.alias) ?? [])]),
    );
    shown.sort((one, other) => RANK[one.status] - RANK[other.status]);
    showRows(shown, known);
    const states = {};
    for (const { status } of models) states[status] = (states[status] ?? 0) + 1;
    put(element("counts"), counted(states));
    put(
      element("no-models"),
      models.length
        ? "No model matches the filter."
        : "No models are configured: start the router with --models-dir, name some in its configuration, or pull one.",
    );
    show(element("no-models"), !shown.length);
    drawPulls(known);
  },
  async ask(known) {
    if (known.pulls.some(isRunning)) outdate("pulls");
    await need("vram", "pulls");
  },
};
