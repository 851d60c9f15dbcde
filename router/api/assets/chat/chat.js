// A small chat, to try a model: it streams, says why it waits, and stops when told to.

import { eventsOf, send } from "../router.js";
import { duration, element, put, stamp } from "../drawing.js";

let turns = [];
let current = null; // the request that is being answered

export function startChat() {
  element("chat-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (current) current.abort.abort();
    else say(element("chat-text").value);
  });
  element("chat-text").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!current) element("chat-form").requestSubmit();
  });
  element("chat-new").addEventListener("click", () => {
    current?.abort.abort();
    turns = [];
    element("chat-turns").replaceChildren();
    element("chat-new").hidden = true;
  });
}

/** Before the router's own words come with the stream, the queue tells how our request is doing. */
export function noteQueue({ per_model: queues }) {
  const queue = queues[current?.model];
  if (!queue || current.isAnswered) return;
  const ours = queue.waiting.find(({ id }) => id === current.id);
  if (ours) {
    const { position, waited_sec: waited, expected_wait_sec: expected, why } = ours;
    const toGo = expected === null ? "time to go unknown" : `~${duration(expected)} to go`;
    put(current.parts.note, `position ${position}, waited ${duration(waited)}, ${toGo}: ${why}`);
  } else if (queue.processing.includes(current.id)) put(current.parts.note, "reading the prompt …");
}

async function say(text) {
  // Of a name that is an alias, queue and slots are its model's.
  const [{ value: name, selectedOptions }] = [element("chat-model")];
  if (!text.trim() || !name) return;
  const conversation = turns; // which may be another by the time of the answer
  conversation.push({ role: "user", content: text });
  put(addTurn("You").said, text);
  element("chat-text").value = "";
  element("chat-new").hidden = false;
  const random = crypto.getRandomValues(new Uint8Array(9)); // randomUUID() is there over HTTPS only
  const id = `page-${[...random].map((byte) => byte.toString(16).padStart(2, "0")).join("")}`;
  current = { id, name, model: selectedOptions[0].dataset.uses, parts: addTurn(name), isAnswered: false };
  current.abort = new AbortController();
  element("chat-send").textContent = "Stop";
  const said = await answer(current, conversation);
  if (said) conversation.push({ role: "assistant", content: said });
  else conversation.pop(); // templates want that both speak in turn
  current = null;
  element("chat-send").textContent = "Send";
}

function addTurn(who) {
  const { root, ...parts } = stamp("turn");
  put(parts.who, who);
  element("chat-turns").append(root);
  toEnd(() => {});
  return parts;
}

/** Changes the conversation, and stays at its end if that was in view. */
function toEnd(change) {
  const box = element("chat-turns");
  const wasThere = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
  change();
  if (wasThere) box.scrollTop = box.scrollHeight;
}

/** What the model has said, as far as it came. */
async function answer(request, messages) {
  const { id, name, parts, abort } = request;
  const said = parts.said.appendChild(new Text());
  const thoughts = parts.thoughts.appendChild(new Text());
  const begun = performance.now();
  let [first, last, figures, waited] = [0, 0, {}, ""];
  let end = "";
  try {
    const headers = { "x-request-id": id, "x-request-priority": element("chat-priority").value };
    const body = { model: name, messages, stream: true, stream_options: { include_usage: true } };
    const stream = await send("v1/chat/completions", body, { headers, signal: abort.signal });
    const [queued, loading] = ["x-queue-ms", "x-load-ms"].map(
      (header) => Number(stream.headers.get(header)) / 1000,
    );
    if (queued > 0.05)
      waited = ` (waited ${duration(queued)}${loading ? `, ${duration(loading)} of it for loading` : ""})`;
    for await (const { comment, data } of eventsOf(stream)) {
      if (comment !== undefined) put(parts.note, comment);
      if (data === undefined || data === "[DONE]") continue;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      figures = { ...figures, ...event.timings, tokens: event.usage?.completion_tokens ?? figures.tokens };
      const { content, reasoning_content: thought } = event.choices?.[0]?.delta ?? {};
      if (!content && !thought) continue;
      last = performance.now();
      first ||= last;
      request.isAnswered = true;
      toEnd(() => {
        if (thought) parts.thinking.hidden = false;
        thoughts.appendData(thought ?? "");
        said.appendData(content ?? "");
        put(parts.note, `first token ${duration((first - begun) / 1000)}${waited}`);
      });
    }
  } catch (error) {
    end = error.name === "AbortError" ? "stopped" : error.message;
    parts.note.classList.toggle("error", error.name !== "AbortError");
  }
  const rate = figures.predicted_per_second ?? (figures.tokens - 1) / ((last - first) / 1000);
  const report = [
    end,
    first && `first token ${duration((first - begun) / 1000)}${waited}`,
    figures.tokens && `${figures.tokens} tokens`,
    Number.isFinite(rate) && `${rate.toFixed(1)} tokens/s`,
  ];
  toEnd(() => put(parts.note, report.filter(Boolean).join(" · ")));
  return said.data;
}
