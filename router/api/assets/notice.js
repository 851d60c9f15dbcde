// What the page says above its views: what went wrong, and questions.

import { element, put, show } from "./drawing.js";

/** Says what went wrong, until it is dismissed. */
export function tell(problem) {
  put(element("notice").firstElementChild, problem);
  show(element("notice"), true);
}

element("notice").lastElementChild.addEventListener("click", () => show(element("notice"), false));

/** Asks before something that cannot be taken back; whether it is to be done. The focus returns to where it was. */
export function sure(question, yes) {
  const dialog = element("sure");
  put(element("sure-question"), question);
  put(element("sure-yes"), yes);
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

element("sure-yes").addEventListener("click", () => element("sure").close("yes"));
element("sure-no").addEventListener("click", () => element("sure").close());
