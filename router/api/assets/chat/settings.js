// What a conversation asks of its model. An empty field leaves it to the model.

import { make, labelled } from "./making.js";

const NUMBERS = {
  temperature: ["Temperature", { min: 0, max: 5, step: "any" }],
  top_p: ["Top P", { min: 0, max: 1, step: "any" }],
  max_tokens: ["Most tokens", { min: 1, step: 1 }],
  seed: ["Seed", { min: 0, max: 4294967295, step: 1 }],
};

/** The form; `show` fills it, and `changed` gets the settings when they were changed to something valid. */
export function settingsForm(changed) {
  const system = make("textarea", { name: "system", rows: "3", placeholder: "You are …" });
  const numbers = Object.entries(NUMBERS).map(([name, [text, limits]]) =>
    labelled(text, make("input", { name, type: "number", placeholder: "default", ...limits })),
  );
  const priority = make(
    "select",
    { name: "priority" },
    ...["", "high", "normal", "low"].map((name) => make("option", { value: name }, name || "default")),
  );
  const json = make("input", { name: "json", type: "checkbox", value: "yes" });
  const form = make(
    "form",
    { class: "settings", submit: (event) => event.preventDefault() },
    labelled("System prompt", system),
    make("div", { class: "numbers" }, ...numbers, labelled("Priority", priority)),
    make("label", { class: "check" }, json, " Answer in JSON"),
    make(
      "small",
      {},
      "An empty field leaves it to the model. They are this conversation's, and apply to its next answer.",
    ),
  );
  form.addEventListener("input", () => {
    if (!form.checkValidity()) return form.reportValidity();
    changed(Object.fromEntries([...new FormData(form)].filter(([, value]) => value)));
  });
  const show = (settings) => {
    for (const field of form.elements) {
      if (field.type === "checkbox") field.checked = Boolean(settings[field.name]);
      else if (field.name && document.activeElement !== field) field.value = settings[field.name] ?? "";
    }
  };
  return { form, show };
}

/** How many settings differ from the model's. */
export const countOf = (settings) => Object.values(settings).filter(Boolean).length;
