// What went wrong, above all views until it is dismissed.

import { element, put, show } from "./drawing.js";

export function tell(problem) {
  put(element("notice").firstElementChild, problem);
  show(element("notice"), true);
}

element("notice").lastElementChild.addEventListener("click", () => show(element("notice"), false));
