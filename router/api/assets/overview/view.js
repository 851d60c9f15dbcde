// What goes on just now: who is resident, who waits, what memory holds and what was decided.

import { element, number, put, show } from "../drawing.js";
import { need, waitsForLoad } from "../known.js";
import { held, rowsOf } from "../models/rows.js";
import { figuresIn } from "../requests/figures.js";
import { drawDecisions } from "./decisions.js";
import { drawKept } from "./kept.js";
import { drawMemory } from "./memory.js";
import { drawQueue } from "./queue.js";
import { askTimeline, drawTimeline, startTimeline } from "./timeline.js";

const FEW_MODELS = 8;

let showRows;
let inOrder;
let drawFigures;
let before = new Set(); // whose rows are there

export const view = {
  name: "overview",
  title: "Overview",
  start() {
    showRows = rowsOf(element("resident-rows"));
    inOrder = held(element("resident-rows"));
    drawFigures = figuresIn(element("figure-rows"), element("since-start"));
    startTimeline();
  },
  draw(known) {
    drawResidents(known);
    drawMemory(known);
    drawTimeline(known);
    drawQueue(known);
    drawFigures(known);
    drawKept(known);
    drawDecisions(known);
  },
  async ask(known) {
    await need("vram", "kv");
    await askTimeline(known);
  },
};

/** All of a few models; of many, those of which there is something to say. A row under the pointer stays. */
function drawResidents(known) {
  const models = [...known.models.values()];
  const isUsed = element("resident-rows").matches(":hover, :focus-within");
  const shown = inOrder(
    models.length > FEW_MODELS
      ? models.filter((model) => isOfInterest(model, known) || (isUsed && before.has(model.alias)))
      : models,
  );
  before = new Set(shown.map(({ alias }) => alias));
  showRows(shown, known);
  const others = models.length - shown.length;
  const all = models.length ? "all models" : "pull a model";
  put(element("others"), others ? `${number(others)}${shown.length ? " more" : ""} off` : all);
  show(element("no-residents"), !shown.length);
  show(element("residents-table"), shown.length);
  put(
    element("no-residents"),
    models.length
      ? "No model is loaded. Each is loaded when it is asked for."
      : "No models are configured: start the router with --models-dir, name some in its configuration, or pull one.",
  );
}

const isOfInterest = (model, { queue, pending }) =>
  model.status !== "off" ||
  waitsForLoad(model) ||
  pending.has(model.alias) ||
  Boolean(model.error_message) ||
  Boolean(queue?.per_model[model.alias]?.queue_length);
