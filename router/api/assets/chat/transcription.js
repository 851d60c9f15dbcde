// What is said in a file of sound.

import { ask as askRouter } from "../router.js";
import { bytes } from "../drawing.js";
import { copier, labelled, make } from "./making.js";
import { offer, usedBy } from "./models.js";
import { Errand } from "./waiting.js";

export function tab(known) {
  const model = make("select", { name: "model" });
  const file = make("input", { name: "file", type: "file", accept: "audio/*,video/*", required: true });
  const language = make("input", { name: "language", placeholder: "any", maxlength: "20", size: "8" });
  const sender = make("button", {}, "Transcribe");
  const note = make("p", { class: "dim", role: "status" });
  const text = make("p", { class: "plain" });
  const result = make(
    "div",
    { class: "result", hidden: true },
    copier(() => text.textContent),
    text,
  );
  const fields = [labelled("Model", model), labelled("File", file), labelled("Language, as en", language)];
  const form = make("form", { class: "errand" }, ...fields, sender, note, result);
  const errand = new Errand({ form, send: sender, note, model: () => usedBy(known, model.value), ask });

  async function ask(headers, signal) {
    const [sound] = file.files;
    const body = new FormData();
    body.append("model", model.value);
    if (language.value.trim()) body.append("language", language.value.trim());
    body.append("response_format", "json");
    body.append("file", sound, sound.name);
    const answer = await askRouter("v1/audio/transcriptions", { method: "POST", body, headers, signal });
    text.textContent = (await answer.json()).text;
    result.hidden = false;
    return `${sound.name}, ${bytes(sound.size)}`;
  }

  return { root: form, draw: () => (offer(model, known, "transcription"), errand.draw(known)) };
}
