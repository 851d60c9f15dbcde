// What a model for embeddings makes of lines: how similar they are to each other.

import { send } from "../router.js";
import { number } from "../drawing.js";
import { labelled, make } from "./making.js";
import { offer, usedBy } from "./models.js";
import { Errand } from "./waiting.js";

const MOST_IN_MATRIX = 12;
const MOST_LINES = 500;

export function tab(known) {
  const model = make("select", { name: "model" });
  const lines = make("textarea", {
    name: "lines",
    rows: "8",
    required: true,
    placeholder: "One text a line. The others are ranked by their similarity to the first.",
  });
  const sender = make("button", {}, "Compare");
  const note = make("p", { class: "dim", role: "status" });
  const result = make("div", { class: "result" });
  const form = make(
    "form",
    { class: "errand" },
    labelled("Model", model),
    labelled("Lines", lines),
    sender,
    note,
    result,
  );
  const errand = new Errand({ form, send: sender, note, model: () => usedBy(known, model.value), ask });

  async function ask(headers, signal) {
    const input = lines.value
      .split("\n")
      .map((line) => line.trim())
      .filter(Boolean);
    if (input.length < 2) throw new Error("Write two lines at least.");
    if (input.length > MOST_LINES)
      throw new Error(`There are ${number(input.length)} lines; up to ${MOST_LINES} are compared.`);
    const answer = await send("v1/embeddings", { model: model.value, input }, { headers, signal });
    const { data, usage } = await answer.json();
    const vectors = data
      .sort((one, other) => one.index - other.index)
      .map(({ embedding }) => normalized(embedding));
    result.replaceChildren(
      ranking(input, vectors),
      ...(input.length <= MOST_IN_MATRIX ? [matrix(input, vectors)] : []),
    );
    const tokens = usage?.prompt_tokens ? ` · ${number(usage.prompt_tokens)} tokens` : "";
    return `${vectors[0].length} dimensions${tokens}`;
  }

  return { root: form, draw: () => (offer(model, known, "embedding"), errand.draw(known)) };
}

function normalized(vector) {
  const length = Math.hypot(...vector) || 1;
  return vector.map((value) => value / length);
}

const similarity = (one, other) => one.reduce((sum, value, index) => sum + value * other[index], 0);

/** A figure that is the darker the nearer it is to 1. */
function cell(value) {
  const level = Math.max(0, Math.min(5, Math.floor(value * 6)));
  return make("td", { class: `level-${level}` }, value.toFixed(3));
}

function ranking(lines, vectors) {
  const rows = lines.slice(1).map((line, index) => [line, similarity(vectors[0], vectors[index + 1])]);
  rows.sort((one, other) => other[1] - one[1]);
  return make(
    "table",
    {},
    make("caption", {}, `Nearest to “${short(lines[0])}”`),
    make(
      "thead",
      {},
      make("tr", {}, make("th", { scope: "col" }, "Similarity"), make("th", { scope: "col" }, "Line")),
    ),
    make("tbody", {}, ...rows.map(([line, value]) => make("tr", {}, cell(value), make("td", {}, line)))),
  );
}

function matrix(lines, vectors) {
  const heads = lines.map((line, index) => make("th", { scope: "col", title: line }, String(index + 1)));
  const rows = vectors.map((one, row) =>
    make(
      "tr",
      {},
      make("th", { scope: "row" }, `${row + 1} ${short(lines[row])}`),
      ...vectors.map((other) => cell(similarity(one, other))),
    ),
  );
  const table = make(
    "table",
    {},
    make("caption", {}, "Each with each"),
    make("thead", {}, make("tr", {}, make("td", {}), ...heads)),
    make("tbody", {}, ...rows),
  );
  return make("div", { class: "table", role: "group", "aria-label": "Each with each", tabindex: "0" }, table);
}

const short = (line) => (line.length > 40 ? `${line.slice(0, 39)}…` : line);
