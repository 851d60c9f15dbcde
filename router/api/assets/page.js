// The page of a llama-router: what it knows, and how it learns it.
//
// States of models come as events. What changes all the time (who waits, who is served, memory) has no events of its
// own and is asked for every two seconds, in one request after the other: a browser opens no more than six
// connections to a server, for all of its tabs, so none is kept for what can be asked.

import { chatWith, noteQueue, startChat } from "./chat.js";
import {
  ask,
  follow,
  forgetKey,
  get,
  hasKey,
  lostSince,
  pause,
  quoted,
  Refused,
  seen,
  send,
  setKey,
  whenLocked,
} from "./router.js";
import {
  canChat,
  drawDecisions,
  drawHead,
  drawKept,
  drawMemory,
  drawModels,
  drawPulls,
  drawQueue,
  drawRequests,
  isRunning,
  waitsForLoad,
} from "./views.js";
import { element } from "./drawing.js";

const LOOK_MS = 2_000;
const NEWS_MS = 500; // after a model's state has changed
const SLOW_LOOKS = 3; // so many looks are between two at what changes slowly
const DECISIONS = 60;
const LOG_LINES = 500;

const known = {
  server: null,
  startedAt: 0,
  models: new Map(),
  cards: new Map(), // what `/v1/models` says, by model
  names: new Map(), // further names of models, by model
  queue: null,
  queueSeenAt: 0,
  vram: null,
  telemetry: null,
  kv: null,
  decisions: [],
  pulls: [],
  pending: new Map(), // by model: what ends the wait for the answer to a command
  manages: false,
};

let due = false;

function draw() {
  if (due) return;
  due = true;
  requestAnimationFrame(() => {
    due = false;
    drawHead(known, lostSince);
    if (!known.server) return;
    document.querySelector("main").hidden = false;
    drawModels(known);
    drawMemory(known);
    drawQueue(known);
    drawRequests(known);
    drawKept(known);
    drawDecisions(known);
    drawPulls(known);
  });
}

// --- models, as they change ----------------------------------------------------------------------------------

let run = "";
let memoryIsOld = true;
let decisionsAreOld = true; // some were made while nobody followed, or before

function note({ event, id, data }) {
  const told = event === "heartbeat" ? {} : JSON.parse(data);
  if (event === "full_status") {
    const [ofRun] = id.split("-");
    if (run && ofRun !== run) decide({ about: "router", state: "back", reason: "it was started again" });
    run = ofRun;
    decisionsAreOld = true;
    noteAll(told);
    lookSoon();
  } else if (event === "model_update") {
    if ("reason" in told) decideAs({ id, model: told.alias, at: told.updated_at, ...told });
    noteModel(told);
  } else if (event === "server_update") {
    known.server = { ...known.server, status: told.status };
    decideAs({ id, model: null, reason: "", ...told });
  }
  draw();
}

function noteAll({ server, models }) {
  const all = Object.values(models);
  known.server = server;
  // By the router's clock, which need not be the browser's.
  const now = all.length ? new Date(all[0].updated_at) : Date.now();
  known.startedAt = performance.now() - (now - new Date(server.started_at));
  const before = [...known.models.keys()].join("\n");
  known.models = new Map(all.map((model) => [model.alias, { ...model, seenAt: performance.now() }]));
  memoryIsOld = true;
  if ([...known.models.keys()].join("\n") !== before) namesAreOld = true;
}

function noteModel(model) {
  if (model.status !== known.models.get(model.alias)?.status) {
    known.pending.get(model.alias)?.abort(); // the row tells the rest
    memoryIsOld = true;
    lookSoon();
  }
  known.models.set(model.alias, { ...model, seenAt: performance.now() });
}

let decided = 0;

/** Adds it where it belongs, unless it is there. */
function decide({ about, state, reason, at = Date.now(), key = `here ${(decided += 1)}` }) {
  if (known.decisions.some((decision) => decision.key === key)) return;
  known.decisions = [{ key, about, state, reason, at: Number(new Date(at)) }, ...known.decisions]
    .sort((one, other) => other.at - one.at)
    .slice(0, DECISIONS);
}

/** What the router tells. After `stopping`, `off` follows for the same reason. */
function decideAs({ id, model, status, reason, at }) {
  if (status !== "stopping")
    decide({ about: model ?? "router", state: status.replace("_", " "), reason, at, key: id });
}

// --- what is asked for ---------------------------------------------------------------------------------------

let namesAreOld = true;
let lookSoon = () => {};

async function look(turn) {
  const stats = await get("v1/queue/stats");
  const before = known.queue?.per_model ?? {};
  [known.queue, known.queueSeenAt] = [stats, performance.now()];
  noteQueue(stats);
  draw();
  for (const [alias, { current_processing: busy, total_requests: total }] of Object.entries(stats.per_model)) {
    const was = before[alias];
    const isIdleAgain = busy === 0 && was && (was.current_processing || was.total_requests !== total);
    if (isIdleAgain && known.models.get(alias)?.status === "ready") {
      noteModel(await get(`v1/models/${quoted(alias)}/status`)); // when it is unloaded now
    }
  }
  if (decisionsAreOld) {
    decisionsAreOld = false;
    (await get("v1/decisions")).decisions.forEach(decideAs);
  }
  for (const model of known.models.values()) {
    if (waitsForLoad(model)) noteModel(await get(`v1/models/${quoted(model.alias)}/status`)); // for what now
  }
  if (memoryIsOld || turn % SLOW_LOOKS === 0) {
    known.vram = await get("vram");
    memoryIsOld = false;
  }
  if (turn % SLOW_LOOKS === 0) known.telemetry = await get("v1/telemetry/summary");
  if (known.manages && turn % SLOW_LOOKS === 0) known.kv = await get("v1/kv?conversations=false");
  if (known.manages && (turn % SLOW_LOOKS === 0 || known.pulls.some(isRunning))) {
    known.pulls = (await get("v1/models/pull")).pulls;
  }
  if (namesAreOld) {
    noteNames((await get("v1/models")).data);
    namesAreOld = false;
  }
  draw();
}

function noteNames(cards) {
  known.cards = new Map(cards.filter((card) => !card.uses).map((card) => [card.id, card]));
  known.names = new Map();
  for (const { id, uses } of cards) {
    if (uses) known.names.set(uses, [...(known.names.get(uses) ?? []), id]);
  }
  offer(element("chat-model"), cards.filter(canChat));
  offer(element("log-model"), [{ id: "" }, ...known.cards.values()]);
}

function offer(select, cards) {
  const chosen = select.value;
  const options = cards.map(({ id, uses }) => {
    const option = new Option(id || "none", id);
    option.dataset.uses = uses ?? id;
    return option;
  });
  select.replaceChildren(...options);
  if (cards.some(({ id }) => id === chosen)) select.value = chosen;
}

async function lookForEver() {
  for (let turn = 0; ; turn += 1) {
    await seen();
    try {
      if (turn === 0) known.manages = await mayManage();
      await look(turn);
    } catch (error) {
      if (turn === 0) turn = -1;
      if (error instanceof Refused) {
        if (error.status !== 503) tell(error.message);
      } else if (!lostSince && error.name !== "AbortError") console.error(error);
      draw();
    }
    await Promise.race([
      pause(LOOK_MS),
      new Promise((resolve) => (lookSoon = () => setTimeout(resolve, NEWS_MS))),
    ]);
  }
}

async function mayManage() {
  try {
    await ask("v1/models/pull");
    return true;
  } catch (error) {
    if (error instanceof Refused && error.status === 403) return false;
    throw error;
  }
}

// --- commands ------------------------------------------------------------------------------------------------

element("model-rows").addEventListener("click", ({ target }) => {
  const button = target.closest("button");
  if (!button) return;
  const { alias } = button.closest("tr").dataset;
  if (button.dataset.part === "chat") chatWith(alias);
  else if (button.dataset.part === "log") readLog(alias);
  else if (button.textContent === "Load") command(alias, "v1/models/load", { model: alias, wait: false });
  else if (["Unload", "Cancel"].includes(button.textContent)) command(alias, "v1/models/eject", { model: alias });
  else command(alias, `v1/models/${quoted(alias)}/reset`, {});
});

/** Waits for the answer only until the model's state changes: what is left to tell, the row tells. */
async function command(alias, path, body) {
  for (const waiting of known.pending.values()) waiting.abort(); // one connection for all that wait for room
  const wait = new AbortController();
  known.pending.set(alias, wait);
  draw();
  try {
    await send(path, body, { signal: wait.signal });
    noteModel(await get(`v1/models/${quoted(alias)}/status`));
  } catch (error) {
    if (error.name !== "AbortError") tell(`${alias}: ${error.message}`);
  }
  if (known.pending.get(alias) === wait) known.pending.delete(alias);
  draw();
}

element("pull-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    await send("v1/models/pull", { model: element("pull-model").value.trim() });
    element("pull-form").reset();
    known.pulls = (await get("v1/models/pull")).pulls;
  } catch (error) {
    tell(error.message);
  }
  draw();
});

element("pull-rows").addEventListener("click", async ({ target }) => {
  const button = target.closest("button");
  if (!button) return;
  try {
    await ask(`v1/models/pull/${button.closest("li").dataset.pull}`, { method: "DELETE" });
    known.pulls = (await get("v1/models/pull")).pulls;
  } catch (error) {
    tell(error.message);
  }
  draw();
});

// --- the log -------------------------------------------------------------------------------------------------

let endLog = () => {};

function readLog(alias) {
  const lines = element("log-lines");
  endLog();
  lines.replaceChildren();
  lines.hidden = !alias;
  element("log-model").value = alias;
  if (!alias) return;
  let news = [];
  const add = () => {
    const atEnd = lines.scrollHeight - lines.scrollTop - lines.clientHeight < 40;
    for (const text of news) lines.appendChild(document.createElement("div")).textContent = text;
    while (lines.childElementCount > LOG_LINES) lines.firstElementChild.remove();
    if (atEnd) lines.scrollTop = lines.scrollHeight;
    news = [];
  };
  const note = ({ data }) => {
    if (news.push(data) === 1) requestAnimationFrame(add);
  };
  const begin = () => lines.replaceChildren();
  const refused = ({ message }) => note({ data: message });
  endLog = follow(`v1/logs/${quoted(alias)}/stream?lines=${LOG_LINES}`, note, { begin, refused });
  lines.scrollIntoView({ block: "nearest" });
}

element("log-model").addEventListener("change", ({ target }) => readLog(target.value));

// --- the key, and what goes wrong ----------------------------------------------------------------------------

whenLocked(
  (reason) =>
    new Promise((resolve) => {
      element("refusal").textContent = reason;
      element("lock").hidden = false;
      element("key").focus();
      element("lock").addEventListener(
        "submit",
        (event) => {
          event.preventDefault();
          setKey(element("key").value.trim());
          element("lock").reset();
          element("lock").hidden = true;
          element("forget").hidden = false;
          resolve();
        },
        { once: true },
      );
    }),
);

element("forget").hidden = !hasKey();
element("forget").addEventListener("click", () => {
  forgetKey();
  location.reload();
});

function tell(problem) {
  element("notice").firstElementChild.textContent = problem;
  element("notice").hidden = false;
}

element("notice").lastElementChild.addEventListener("click", () => {
  element("notice").hidden = true;
});

element("filter").addEventListener("input", draw);
startChat();
follow("v1/models/status/stream", note);
lookForEver();
setInterval(draw, 1000);
