// Requests that wait: what is known of them, and those whose answer comes at once or not at all.

import { duration, put } from "../drawing.js";
import { problem } from "./answer.js";
import { identity } from "./making.js";

/** What the queue says of a request of this model; "" if it is not there. */
export function waitOf({ queue }, id, model) {
  const ours = queue?.per_model[model];
  const waiting = ours?.waiting.find((each) => each.id === id);
  if (waiting) {
    const { position, waited_sec: waited, expected_wait_sec: expected, why } = waiting;
    const toGo = expected === null ? "time to go unknown" : `~${duration(expected)} to go`;
    return `position ${position}, waited ${duration(waited)}, ${toGo}: ${why}`;
  }
  return ours?.processing.includes(id) ? "reading the prompt …" : "";
}

/** A form that asks the router for something, says how that waits, and can take it back. */
export class Errand {
  #abort = null;
  #id = "";

  /** `ask` gets headers and a signal, and returns what there is to say of the answer. */
  constructor({ form, send, note, model, ask }) {
    Object.assign(this, { send, note, model, words: send.textContent });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.#abort) this.#abort.abort();
      else this.#run(ask);
    });
    form.addEventListener("keydown", ({ key }) => {
      if (key === "Escape") this.#abort?.abort();
    });
  }

  async #run(ask) {
    [this.#abort, this.#id] = [new AbortController(), identity("page")];
    put(this.send, "Cancel");
    this.#say("asking …");
    const begun = performance.now();
    try {
      const said = await ask({ "x-request-id": this.#id }, this.#abort.signal);
      this.#say([said, duration((performance.now() - begun) / 1000)].filter(Boolean).join(" · "));
    } catch (error) {
      if (error.name === "AbortError") this.#say("cancelled");
      else this.#say(problem(error), true);
    }
    this.#abort = null;
    put(this.send, this.words);
  }

  #say(text, isError = false) {
    put(this.note, text);
    this.note.classList.toggle("error", isError);
  }

  draw(known) {
    const wait = this.#abort && waitOf(known, this.#id, this.model());
    if (wait) this.#say(wait);
  }
}
