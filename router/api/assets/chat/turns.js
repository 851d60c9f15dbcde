// How a turn of a conversation is drawn.

import { duration, number, put, show } from "../drawing.js";
import { address } from "../routes.js";
import { parted } from "./answer.js";
import { button, copier, make } from "./making.js";
import { Rendering } from "./markdown.js";

const KV = { slot: "from the engine's memory", disk: "from disk" };

/**
 * One turn. `actions` are what its buttons do: edit, again, remove, step, stop; they get the turn. `within` is called
 * with each change that is made later.
 */
export class TurnView {
  #turn;
  #drawn = null; // the text that is shown
  #isOpen = false; // more of it is to come
  #rendering = null;
  #within;
  #isNear = false; // the part that is seen: elsewhere, the text of an answer is enough, which is found and measured

  constructor(turn, actions) {
    this.#turn = turn;
    this.#within = actions.within;
    const quiet = (text, act, more = {}) => button(text, () => act(turn), { class: "quiet", ...more });
    const isOurs = turn.role === "user";
    this.who = make("h3", {}, isOurs ? "You" : turn.model);
    this.said = make(isOurs ? "p" : "div", { class: isOurs ? "said plain" : "said markdown" });
    this.thoughts = make("p", { class: "plain" });
    this.summary = make("summary");
    this.thinking = make("details", { class: "thoughts", hidden: true }, this.summary, this.thoughts);
    this.stop = quiet("Stop", actions.stop);
    this.wait = make("p", { class: "wait" }, make("span"), " ", this.stop);
    this.error = make("p", { class: "error" });
    this.note = make("small");
    this.request = make("a", { href: "#/", title: "This request in the list of requests" }, "Request");
    this.back = quiet("‹", () => actions.step(turn, -1), { "aria-label": "Previous version" });
    this.count = make("span");
    this.on = quiet("›", () => actions.step(turn, 1), { "aria-label": "Next version" });
    this.branches = make("span", { class: "branches" }, this.back, this.count, this.on);
    this.again = quiet("Again", actions.again, { title: "Ask for another answer, beside this one" });
    this.buttons = make(
      "p",
      { class: "buttons" },
      this.branches,
      copier(() => (isOurs ? turn.text : parted(turn).said)),
      isOurs ? quiet("Edit", actions.edit, { title: "Change it, and ask again beside this one" }) : this.again,
      quiet("Delete", actions.remove, { title: "This and all that follows" }),
      isOurs ? null : this.request,
    );
    const parts = isOurs
      ? [this.who, ...turn.files.map(fileView), this.said, this.buttons]
      : [this.who, this.thinking, this.said, this.wait, this.error, this.note, this.buttons];
    this.root = make("article", { class: `turn ${turn.role}` }, ...parts);
  }

  /** When its text may be drawn next, while it is being written. */
  get due() {
    return this.#rendering?.due ?? 0;
  }

  /** `wait`: what is known of a request that is not answered yet; null if none is under way. */
  draw({ siblings, wait, isRunning }) {
    const turn = this.#turn;
    show(this.branches, siblings.length > 1);
    put(this.count, `${siblings.indexOf(turn) + 1}/${siblings.length}`);
    if (turn.role === "user") put(this.said, turn.text);
    else this.#drawAnswer(wait, isRunning);
  }

  #drawAnswer(wait, isRunning) {
    const turn = this.#turn;
    put(this.who, turn.model);
    const { thought, said } = parted(turn);
    this.#drawThought(thought, said, isRunning);
    this.#drawSaid(turn.json && said ? `\`\`\`json\n${said}${isRunning ? "" : "\n```"}` : said, isRunning);
    show(this.wait, isRunning);
    put(this.wait.firstElementChild, turn.state === "waiting" ? wait || "asking …" : "");
    put(this.stop, turn.state === "waiting" ? "Cancel" : "Stop");
    put(this.error, turn.state === "failed" ? (turn.error ?? "") : "");
    show(this.error, turn.state === "failed");
    put(this.again, turn.state === "failed" ? "Retry" : "Again");
    put(this.note, noteOf(turn, said, isRunning));
    show(this.note, this.note.textContent !== "");
    show(this.buttons, !isRunning);
    put(this.request, address("requests", [turn.request ?? ""]), "hash");
  }

  #drawThought(thought, said, isRunning) {
    show(this.thinking, thought !== "");
    const { data, length } = this.thoughts.firstChild ?? this.thoughts.appendChild(new Text());
    if (data.length > thought.length || !thought.startsWith(data)) put(this.thoughts, thought);
    else if (length < thought.length) this.thoughts.firstChild.appendData(thought.slice(length));
    const { thoughtSec } = this.#turn;
    const took = thoughtSec === undefined ? "" : ` for ${duration(thoughtSec)}`;
    put(this.summary, isRunning && !said ? "Thinking …" : `Thought${took}`);
  }

  /** It has come near to what is seen. */
  approach() {
    this.#isNear = true;
    if (this.#drawn !== null && !this.#rendering) this.#render(this.#drawn, true);
  }

  #drawSaid(text, isRunning) {
    if (!this.#isNear && !isRunning && !this.#rendering) {
      put(this.said, text);
      this.#drawn = text;
    } else if (this.#drawn !== text || this.#isOpen === !isRunning) {
      if (!isRunning || performance.now() >= this.due) this.#render(text, !isRunning);
    }
  }

  #render(text, isOver) {
    this.#drawn = text;
    this.#isOpen = !isOver;
    this.#rendering ??= new Rendering(this.said, this.#within);
    this.#rendering.draw(text, isOver);
  }
}

/** What there is to say of an answer. */
function noteOf(turn, said, isRunning) {
  const { state, firstSec, waitedSec, loadedSec, tokens, rate, promptTokens, cachedTokens, kv, finish } = turn;
  const loaded = loadedSec ? `, ${duration(loadedSec)} of it for loading` : "";
  const waited = waitedSec ? ` (waited ${duration(waitedSec)}${loaded})` : "";
  const isCut = !isRunning && ["waiting", "answering"].includes(state);
  const cached = cachedTokens
    ? `${number(cachedTokens)} of ${number(promptTokens ?? 0)} prompt tokens cached`
    : "";
  return [
    state === "stopped" && "stopped",
    isCut && "cut off: the page was closed or loaded anew, or another tab is writing it",
    state === "done" && !said && "it said nothing",
    finish === "length" && "cut off at the most tokens",
    firstSec !== undefined && `first token ${duration(firstSec)}${waited}`,
    tokens && `${number(tokens)} tokens`,
    rate && `${rate.toFixed(1)} tokens/s`,
    cached && `${cached}${KV[kv] ? `, ${KV[kv]}` : ""}`,
  ]
    .filter(Boolean)
    .join(" · ");
}

/** A file of a message. */
export function fileView(file) {
  if (file.kind === "image") return picture(file);
  const lines = file.text.split("\n").length;
  return make(
    "details",
    { class: "file" },
    make("summary", {}, `${file.name} (${number(lines)} lines)`),
    make("pre", { tabindex: "0", role: "group", "aria-label": file.name }, file.text),
  );
}

export function picture({ name, blob }) {
  const image = make("img", { class: "picture", alt: name, title: name });
  image.src = URL.createObjectURL(blob);
  image.addEventListener("load", () => URL.revokeObjectURL(image.src), { once: true });
  return image;
}
