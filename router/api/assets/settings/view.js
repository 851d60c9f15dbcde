// The key and the look of the page.

import { element, put, show } from "../drawing.js";
import { forgetKey, hasKey } from "../router.js";

const THEME = "llama-router theme"; // read by theme.js

export const view = {
  name: "settings",
  title: "Settings",
  start() {
    element("forget").addEventListener("click", () => {
      forgetKey();
      location.reload();
    });
    element("theme").addEventListener("change", ({ target }) => {
      const { value } = target;
      document.documentElement.dataset.theme = value;
      if (value) localStorage.setItem(THEME, value);
      else localStorage.removeItem(THEME);
    });
  },
  show() {
    element("theme").value = localStorage.getItem(THEME) ?? "";
  },
  draw({ manages }) {
    show(element("forget"), hasKey());
    const may = manages ? "Everything." : "Inference only: it manages nothing.";
    put(element("may"), hasKey() ? may : "No key was asked for.");
  },
};
