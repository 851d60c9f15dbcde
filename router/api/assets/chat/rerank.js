// In which order a reranker puts documents for a query.

import { send } from "../router.js";
import { labelled, make } from "./making.js";
import { offer, usedBy } from "./models.js";
import { Errand } from "./waiting.js";

export function tab(known) {
  const model = make("select", { name: "model" });
  const query = make("input", { name: "query", required: true });
  const texts = make("textarea", {
    name: "documents",
    rows: "8",
    required: true,
    placeholder: "One document a line.",
  });
  const sender = make("button", {}, "Rank");
  const note = make("p", { class: "dim", role: "status" });
  const result = make("div", { class: "result" });
  const fields = [labelled("Model", model), labelled("Query", query), labelled("Documents", texts)];
  const form = make("form", { class: "errand" }, ...fields, sender, note, result);
  const errand = new Errand({ form, send: sender, note, model: () => usedBy(known, model.value), ask });

  async function ask(headers, signal) {
    const documents = texts.value
      .split("\n")
      .map((line) => line.trim())
      .filter(Boolean);
    if (!documents.length) throw new Error("Write a document at least.");
    const body = { model: model.value, query: query.value, documents };
    const { results } = await (await send("v1/rerank", body, { headers, signal })).json();
    results.sort((one, other) => other.relevance_score - one.relevance_score);
    result.replaceChildren(
      make(
        "table",
        {},
        make("caption", {}, `Documents for “${query.value}”`),
        make(
          "thead",
          {},
          make(
            "tr",
            {},
            ...["Place", "Score", "Was", "Document"].map((text) => make("th", { scope: "col" }, text)),
          ),
        ),
        make(
          "tbody",
          {},
          ...results.map(({ index, relevance_score: score }, place) => {
            const cells = [place + 1, score.toFixed(3), index + 1, documents[index]];
            return make("tr", {}, ...cells.map((text) => make("td", {}, String(text))));
          }),
        ),
      ),
    );
    return "";
  }

  return { root: form, draw: () => (offer(model, known, "rerank"), errand.draw(known)) };
}
