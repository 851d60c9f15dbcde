// What was decided of models, and why.

import { element, list, plain, show } from "../drawing.js";

const showDecisions = list(
  element("decision-rows"),
  plain("li"),
  (decision) => decision.key,
  ({ root }, decision) => {
    if (root.children.length) return; // it never changes
    const part = (tag, text, name = "") => {
      const node = document.createElement(tag);
      node.className = name;
      node.textContent = text;
      root.append(node, " ");
    };
    root.dataset.state = decision.state;
    part("time", new Date(decision.at).toLocaleTimeString("en-GB"), "dim");
    part("b", decision.about);
    part("span", decision.state, "state");
    part("span", decision.reason, "reason");
  },
);

export function drawDecisions({ decisions }) {
  showDecisions(decisions);
  show(element("no-decisions"), !decisions.length);
}

