// One answer of a model: what is asked for, and the stream in which it comes.

import { eventsOf, Refused, send } from "../router.js";
import { dataUrl, fenced } from "./conversations.js";
import { identity } from "./making.js";

const END_OF_THOUGHT = "</think>";

/** The messages that a path through a conversation is. Images are left out for a model that sees none. */
async function messagesOf(path, { system, sees }) {
  const messages = system?.trim() ? [{ role: "system", content: system }] : [];
  for (const turn of path) {
    const content = turn.role === "user" ? await contentOf(turn, sees) : parted(turn).said.trim();
    if (!content.length) continue; // an answer that failed
    const last = messages.at(-1);
    if (last?.role === turn.role)
      last.content = joined(last.content, content); // templates want that both speak in turn
    else messages.push({ role: turn.role, content });
  }
  return messages;
}

async function contentOf({ text, files }, sees) {
  const texts = files.filter(({ kind }) => kind === "text").map((file) => fenced(file.name, file.text));
  const images = files.filter(({ kind }) => kind === "image");
  const said = [...texts, text].filter((part) => part.trim()).join("\n\n");
  if (!images.length) return said;
  if (!sees) return [...images.map(({ name }) => `[image: ${name}]`), said].join("\n\n");
  const urls = await Promise.all(images.map(({ blob }) => dataUrl(blob)));
  const parts = urls.map((url) => ({ type: "image_url", image_url: { url } }));
  return said ? [...parts, { type: "text", text: said }] : parts;
}

function joined(before, after) {
  if (typeof before === "string" && typeof after === "string") return `${before}\n\n${after}`;
  const parts = (content) => (typeof content === "string" ? [{ type: "text", text: content }] : content);
  return [...parts(before), ...parts(after)];
}

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

function bodyOf(model, messages, settings) {
  const body = { model, messages, stream: true, stream_options: { include_usage: true } };
  for (const name of NUMBERS) if (settings[name]) body[name] = Number(settings[name]);
  if (settings.json) body.response_format = { type: "json_object", schema: { type: "object" } }; // older engines need it
  return body;
}

/** What a turn thought, and what it said: some engines leave `<think>` in the text. */
export function parted({ text, thought = "" }) {
  const end = text.indexOf(END_OF_THOUGHT);
  const begins = /^\s*<think>/.exec(text.slice(0, 100))?.[0] ?? "";
  if (end >= 0) {
    const before = text.slice(begins.length, end); // without a beginning if that is in the model's template
    return { thought: thought + before.trim(), said: text.slice(end + END_OF_THOUGHT.length).trimStart() };
  }
  return begins ? { thought: thought + text.slice(begins.length), said: "" } : { thought, said: text };
}

/**
 * Fills a turn with the answer to what is before it, as it comes; `changed` is called after each change. Its state
 * is `waiting`, `answering`, and at last `done`, `stopped` or `failed`.
 */
export class Answer {
  #abort = new AbortController();

  constructor(turn, path, { settings, sees, changed }) {
    Object.assign(turn, {
      text: "",
      thought: "",
      state: "waiting",
      request: identity("page"),
      json: Boolean(settings.json),
    });
    for (const name of [
      "error",
      "firstSec",
      "thoughtSec",
      "tokens",
      "rate",
      "finish",
      "kv",
      "cachedTokens",
      "waitedSec",
      "loadedSec",
    ])
      delete turn[name];
    this.turn = turn;
    this.wait = ""; // what the router says of it
    this.begun = performance.now();
    this.over = this.#run(path, settings, sees, changed);
  }

  stop() {
    this.#abort.abort();
  }

  async #run(path, settings, sees, changed) {
    const { turn } = this;
    try {
      await this.#ask(path, settings, sees, changed);
      turn.state = "done";
    } catch (error) {
      turn.state = error.name === "AbortError" ? "stopped" : "failed";
      if (turn.state === "failed") turn.error = problem(error);
    }
    changed();
  }

  async #ask(path, settings, sees, changed) {
    const { turn } = this;
    const headers = { "x-request-id": turn.request };
    if (settings.priority) headers["x-request-priority"] = settings.priority;
    const body = bodyOf(turn.model, await messagesOf(path, { system: settings.system, sees }), settings);
    const stream = await send("v1/chat/completions", body, { headers, signal: this.#abort.signal });
    this.#noteHeaders(stream.headers);
    let [first, last, thinking, timings] = [0, 0, 0, {}];
    for await (const { comment, data } of eventsOf(stream)) {
      if (comment !== undefined && !first) {
        this.wait = comment;
        turn.waitedSec = (performance.now() - this.begun) / 1000; // its headers came before that was known
        changed();
      }
      if (data === undefined || data === "[DONE]") continue;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      timings = event.timings ?? timings;
      this.#noteUsage(event.usage);
      const [{ delta = {}, finish_reason: finish } = {}] = event.choices ?? [];
      if (finish) turn.finish = finish;
      const said = (delta.content ?? "").replaceAll("\r", "");
      const thought = delta.reasoning_content ?? delta.reasoning ?? "";
      if (!said && !thought) continue;
      last = performance.now();
      first ||= last;
      turn.firstSec ??= (first - this.begun) / 1000;
      turn.state = "answering";
      turn.thought += thought;
      turn.text += said;
      if (thought || (!turn.thought && /^\s*<think>/.test(turn.text.slice(0, 20)))) thinking ||= last;
      if (thinking && turn.thoughtSec === undefined && this.#hasThought(said))
        turn.thoughtSec = (last - thinking) / 1000;
      changed();
    }
    turn.tokens ??= timings.predicted_n;
    turn.cachedTokens ??= timings.cache_n;
    const rate = timings.predicted_per_second ?? (turn.tokens - 1) / ((last - first) / 1000);
    if (Number.isFinite(rate)) turn.rate = rate;
  }

  /** Whether this is the first piece after the thoughts. */
  #hasThought(said) {
    if (this.turn.thought) return Boolean(said);
    return this.turn.text.slice(-said.length - END_OF_THOUGHT.length).includes(END_OF_THOUGHT);
  }

  #noteHeaders(headers) {
    const { turn } = this;
    const [waited, loaded] = ["x-queue-ms", "x-load-ms"].map((name) => Number(headers.get(name)) / 1000);
    if (waited > 0.05) Object.assign(turn, { waitedSec: waited, loadedSec: loaded });
    if (headers.has("x-kv")) turn.kv = headers.get("x-kv");
    const why = headers.get("x-queue-reason");
    if (why) this.wait = `position ${headers.get("x-queue-position")}: ${why}`;
  }

  #noteUsage(usage) {
    if (!usage) return;
    const { turn } = this;
    turn.tokens = usage.completion_tokens ?? turn.tokens;
    turn.promptTokens = usage.prompt_tokens ?? turn.promptTokens;
    turn.cachedTokens = usage.prompt_tokens_details?.cached_tokens ?? turn.cachedTokens;
  }
}

/** What went wrong, as the router says it; or that it says nothing. */
export function problem(error) {
  if (error instanceof Refused || !(error instanceof TypeError)) return error.message;
  return `The router did not answer (${error.message}).`;
}
