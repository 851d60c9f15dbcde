// The page of a llama-router: how it learns what all of its views show, and the frame around them.
//
// States of models come as events. What changes all the time (who waits, who is served, memory) has no events of its
// own and is asked for every two seconds, in one request after the other: a browser opens no more than six
// connections to a server, for all of its tabs, so none is kept for what can be asked.

import { announce, ago, duration, element, focusOn, number, perSec, put, show, stopPresses } from "./drawing.js";
import { changed, known, need, outdate, waitsForLoad, whenChanged } from "./known.js";
import { ask, follow, get, lostSince, pause, quoted, Refused, seen, setKey, whenLocked } from "./router.js";
import { enter, shown } from "./routes.js";
import { tell } from "./notice.js";

const LOOK_MS = 2_000;
const NEWS_MS = 500; // after a model's state has changed
const DECISIONS = 200;

whenChanged(() => {
  drawHead();
  if (!known.server) return;
  show(element("views"), true);
  shown?.draw?.(known);
});

function drawHead() {
  const { server, queue, telemetry, startedAt } = known;
  put(
    element("server"),
    lostSince ? "no answer, reconnecting …" : (server?.status ?? (element("lock").hidden ? "connecting …" : "signed out")).replace("_", " "),
  );
  put(document.body.dataset, lostSince ? "lost" : (server?.status ?? ""), "server");
  const { total_processing: served = 0, total_queued: queued = 0 } = queue?.summary ?? {};
  const pace = perSec(telemetry?.windows["1m"].output_tokens ?? 0, 60);
  const figures = `${number(served)} in flight · ${number(queued)} waiting · ${pace} tokens/s`;
  const since = lostSince
    ? `for ${duration(Math.round(ago(lostSince)))}`
    : `up ${duration(Math.round(ago(startedAt)))}`;
  put(element("totals"), server ? `${since} · ${figures}` : "");
}

// --- models, as they change ----------------------------------------------------------------------------------

let run = "";
let decisionsAreOld = true; // some were made while nobody followed, or before

function note({ event, id, data }) {
  const told = event === "heartbeat" ? {} : JSON.parse(data);
  if (event === "full_status") {
    const [ofRun] = id.split("-");
    if (run && ofRun !== run) decide({ model: null, state: "back", reason: "it was started again" });
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
  changed();
}

function noteAll({ server, models }) {
  const all = Object.values(models);
  known.server = server;
  // By the router's clock, which need not be the browser's.
  const now = all.length ? new Date(all[0].updated_at) : Date.now();
  known.startedAt = performance.now() - (now - new Date(server.started_at));
  const before = [...known.models.keys()].join("\n");
  known.models = new Map(all.map((model) => [model.alias, { ...model, seenAt: performance.now() }]));
  outdate("vram");
  if ([...known.models.keys()].join("\n") !== before) namesAreOld = true;
}

const ANNOUNCED = { ready: "is ready", failed: "has failed", off: "is unloaded", asleep: "sleeps" };

function noteModel(model) {
  const { alias, status } = model;
  if (status !== known.models.get(alias)?.status) {
    known.pending.get(alias)?.abort(); // the row tells the rest
    outdate("vram");
    lookSoon();
    if (status in ANNOUNCED) announce(`${alias} ${ANNOUNCED[status]}`);
  }
  known.models.set(alias, { ...model, seenAt: performance.now() });
}

let decided = 0;

/** Adds it where it belongs, unless it is there. */
function decide({ model, state, reason, at = Date.now(), key = `here ${(decided += 1)}` }) {
  if (known.decisions.some((decision) => decision.key === key)) return;
  known.decisions = [{ key, model, state, reason, at: Number(new Date(at)) }, ...known.decisions]
    .sort((one, other) => other.at - one.at)
    .slice(0, DECISIONS);
}

/** What the router tells. After `stopping`, `off` follows for the same reason. */
function decideAs({ id, model, status, reason, at }) {
  if (status !== "stopping")
    decide({ model, state: status.replace("_", " "), reason, at, key: id });
}

// --- what is asked for ---------------------------------------------------------------------------------------

let namesAreOld = true;
let lookSoon = () => {};
let lookNow = () => {};

/** Of a model that has had no requests lately: the router tells of the others only. */
const QUIET = { queue_length: 0, by_priority: {}, current_processing: 0, processing: [], waiting: [] };

async function look() {
  const stats = await get("v1/queue/stats?active_within=10");
  const before = known.queue?.per_model ?? {};
  const quiet = Object.fromEntries([...known.models.keys()].map((alias) => [alias, QUIET]));
  known.queue = { ...stats, per_model: { ...quiet, ...stats.per_model } };
  known.queueSeenAt = performance.now();
  changed();
  for (const [alias, now] of Object.entries(known.queue.per_model)) {
    const { current_processing: busy, total_requests: total } = now;
    const was = before[alias];
    const hasServed = was?.current_processing || (now !== QUIET && was?.total_requests !== total);
    const isIdleAgain = busy === 0 && was && hasServed;
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
  await need("telemetry");
  if (namesAreOld) {
    noteNames((await get("v1/models")).data);
    namesAreOld = false;
  }
  await shown?.ask?.(known);
  changed();
}

function noteNames(cards) {
  known.allCards = cards;
  known.cards = new Map(cards.filter((card) => !card.uses).map((card) => [card.id, card]));
  known.names = new Map();
  for (const { id, uses } of cards) {
    if (uses) known.names.set(uses, [...(known.names.get(uses) ?? []), id]);
  }
}

async function lookForEver() {
  for (let turn = 0; ; turn += 1) {
    await seen();
    const news = new Promise((resolve) => {
      lookNow = resolve;
      lookSoon = () => setTimeout(resolve, NEWS_MS);
    });
    try {
      if (turn === 0) known.manages = await mayManage();
      await look();
    } catch (error) {
      if (turn === 0) turn = -1;
      if (error instanceof Refused) {
        if (error.status !== 503) tell(error.message);
      } else if (!lostSince && error.name !== "AbortError") console.error(error);
      changed();
    }
    await Promise.race([pause(LOOK_MS), news]);
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

// --- the key -------------------------------------------------------------------------------------------------

whenLocked(
  (reason) =>
    new Promise((resolve) => {
      put(element("refusal"), reason);
      show(element("lock"), true);
      element("key").focus();
      element("lock").addEventListener(
        "submit",
        (event) => {
          event.preventDefault();
          setKey(element("key").value.trim());
          element("lock").reset();
          focusOn(element("title"));
          show(element("lock"), false);
          resolve();
        },
        { once: true },
      );
    }),
);

// --- views ---------------------------------------------------------------------------------------------------

async function navigate() {
  await enter((error) => tell(`This view cannot be loaded: ${error.message}`));
  changed();
  lookNow();
}

addEventListener("hashchange", navigate);
stopPresses();
navigate();
follow("v1/models/status/stream", note);
lookForEver();
setInterval(changed, 1000);
