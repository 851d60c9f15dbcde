// What the page knows of the router, for all of its views, and how it is asked for.

import { get } from "./router.js";

export const known = {
  server: null,
  startedAt: 0,
  models: new Map(), // by alias, in the order of the configuration
  cards: new Map(), // what `/v1/models` says, by model
  names: new Map(), // further names of models, by model
  allCards: [], // of models and of their further names
  queue: null,
  queueSeenAt: 0,
  vram: null,
  telemetry: null,
  kv: null,
  health: {}, // of the engines of models, and how the last one ended
  found: null, // what was found but is not served
  decisions: [],
  pulls: [],
  pending: new Map(), // by model: what ends the wait for the answer to a command
  manages: false,
};

const SLOWLY_MS = 5_500; // what changes slowly is asked for in every third look

/** What views may ask for, and how it is kept. */
const FACTS = {
  vram: { path: "vram" },
  telemetry: { path: "v1/telemetry/summary?models=false" },
  health: { path: "v1/health/models", manages: true, of: (answer) => answer.models },
  found: { path: "v1/models/found", manages: true },
  kv: { path: "v1/kv?conversations=false", manages: true },
  pulls: { path: "v1/models/pull", manages: true, of: (answer) => answer.pulls },
};
const askedAt = new Map();

/** Asks for these, one after the other, as far as they are not fresh. */
export async function need(...names) {
  for (const name of names) {
    const { path, manages, of = (answer) => answer } = FACTS[name];
    if (manages && !known.manages) continue;
    if (performance.now() - (askedAt.get(name) ?? -Infinity) < SLOWLY_MS) continue;
    known[name] = of(await get(path));
    askedAt.set(name, performance.now());
  }
}

/** It is asked for again in the next look. */
export const outdate = (name) => askedAt.delete(name);

const listeners = [];
let due = false;

export const whenChanged = (draw) => listeners.push(draw);

/** Something has changed: it is drawn in the next frame. */
export function changed() {
  if (due) return;
  due = true;
  requestAnimationFrame(() => {
    due = false;
    for (const draw of listeners) draw();
  });
}

/** Whether it is to be loaded by hand once there is room. */
export const waitsForLoad = ({ status, load_asked_at }) => status === "off" && Boolean(load_asked_at);

/** As far as it is known. */
export const canChat = (card) => !card?.capabilities || card.capabilities.includes("completion");

export const isRunning = (pull) => ["resolving", "downloading"].includes(pull.status);
