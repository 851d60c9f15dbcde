// What was decided of models, and why.

import { element, link, list, plain, show } from "../drawing.js";
import { addressOf } from "../routes.js";

const SHOWN = 60;

/** Makes the children of `parent` decisions; the returned function is called with them. */
export const decisionsIn = (parent) =>
  list(
    parent,
    plain("li"),
    (decision) => decision.key,
    ({ root }, decision) => {
      if (root.children.length) return; // it never changes
      const part = (tag, text, name = "") => {
        const node = document.createElement(tag);
        node.className = name;
        node.textContent = text;
        root.append(node, " ");
        return node;
      };
      root.dataset.state = decision.state;
      const at = new Date(decision.at);
      const isToday = at.toDateString() === new Date().toDateString();
      part("time", isToday ? at.toLocaleTimeString("en-GB") : at.toLocaleString("en-GB"), "dim");
      if (decision.model) link(part("a", decision.model, "name"), addressOf(decision.model));
      else part("b", "router");
      part("span", decision.state, "state");
      part("span", decision.reason, "reason");
    },
  );

let showDecisions;

export function drawDecisions({ decisions }) {
  showDecisions ??= decisionsIn(element("decision-rows"));
  showDecisions(decisions.slice(0, SHOWN));
  show(element("no-decisions"), !decisions.length);
}
