// The page of a model.

import {
  allow,
  announce,
  bytes,
  copy,
  duration,
  element,
  link,
  number,
  put,
  putFacts,
  secondsBetween,
  show,
  size,
  tokens,
} from "../drawing.js";
import { canChat, changed, known, need } from "../known.js";
import { sure, tell } from "../notice.js";
import { decisionsIn } from "../overview/decisions.js";
import { rowsOf, waitingIn } from "../overview/queue.js";
import { ask, get, quoted, send } from "../router.js";
import { address, addressOf } from "../routes.js";
import { act } from "./commands.js";
import { actionOf, leaves, stateOf, why } from "./rows.js";

const KEEP_MORE = [
  ["", "as configured"],
  ["3600", "for 1 h"],
  ["14400", "for 4 h"],
  ["tomorrow", "until tomorrow"],
];
const SHOWN_WAITING = 100;

let alias = "";
let details = null; // what the list's state does not tell: the command line
let detailsOf = ""; // the state that they are of
let forecast = null; // what it would take, while it is off or has failed
let showWaiting;
let showDecisions;

export function startModel() {
  showWaiting = waitingIn(element("model-waiting-rows"));
  showDecisions = decisionsIn(element("model-decisions"));
  element("model-manage").addEventListener("click", ({ target }) => act(alias, target.textContent));
  element("model-copy").addEventListener("click", ({ target }) => copy(element("model-command").textContent, target));
  element("model-remove").addEventListener("click", remove);
  element("model-keep").addEventListener("change", ({ target }) => keep(target.value));
}

export function showModel(name) {
  if (name === alias) return;
  alias = name;
  [details, detailsOf, forecast] = [null, "", null];
  put(element("model-title"), alias);
  link(element("model-log"), addressOf(alias, "logs"));
  link(element("model-chat"), address("chat", [], { model: alias }));
  link(element("model-requests"), address("requests", [], { model: alias }));
}

export function leaveModel() {
  alias = "";
}

export async function needForModel() {
  const of = alias;
  const model = known.models.get(of);
  if (!model) return;
  const state = `${model.status} ${model.pid} ${model.pinned_until}`;
  if (known.manages && state !== detailsOf) {
    const told = await get(`v1/models/${quoted(of)}/status`);
    if (alias !== of) return;
    [details, detailsOf] = [told, state];
    known.models.set(of, { ...model, pinned: told.pinned, pinned_until: told.pinned_until });
  }
  if (known.manages && !forecast && ["off", "failed"].includes(model.status) && !model.memory) {
    forecast = { message: "" };
    try {
      const told = await (await send("v1/models/estimate", { model: of })).json();
      if (alias === of) forecast = told;
    } catch (error) {
      if (alias === of) forecast = { message: error.message };
    }
  }
  await need("vram", "health");
}

export function drawModel() {
  const model = known.models.get(alias);
  const names = known.names.get(alias);
  const further = known.allCards.find(({ id, uses }) => id === alias && uses);
  if (!model && further) {
    location.replace(addressOf(further.uses)); // the address has another of its names
    return;
  }
  for (const part of element("model-page").querySelectorAll(".columns, .tools")) show(part, model);
  put(element("model-state"), model ? stateOf(model) : "");
  put(element("model-head").dataset, model?.status ?? "", "state");
  const [said, isTrouble] = model ? why(model, known) : ["There is no model of this name.", true];
  put(element("model-why"), said);
  put(element("model-why"), isTrouble ? "error" : "dim", "className");
  if (!model) return;

  const card = known.cards.get(alias) ?? {};
  const { manages, queue, queueSeenAt } = known;
  const action = actionOf(model);
  put(element("model-manage"), action);
  allow(element("model-manage"), !known.pending.has(alias) && model.status !== "stopping");
  for (const id of ["model-manage", "model-log", "model-keep"]) show(element(id), manages);
  show(element("model-remove"), manages && card.can_remove);
  show(element("model-chat"), canChat(card));
  drawKeep(model);

  const ofQueue = queue?.per_model[alias];
  putFacts(element("model-now"), [
    ["requests in flight", model.started_at ? `${ofQueue?.current_processing ?? model.in_flight} of ${model.slots}` : ""],
    ["unloads", leaves(model, ofQueue?.current_processing ?? model.in_flight)],
    ["loaded", model.started_at ? at(model.started_at) : ""],
    ["last used", model.last_used_at ? at(model.last_used_at) : "not since the start of the router"],
    ["loads in", model.load_sec === null ? "not known yet" : `${duration(model.load_sec)}, as measured`],
    ["engine", [model.engine, model.engine_reason].filter(Boolean).join(": ")],
    ["runs otherwise than configured", model.fallback ?? ""],
    ["sleep", sleepOf(model.sleep)],
    ["engines", model.engines?.map(({ name, status, port }) => `${name} ${status}${port ? `, port ${port}` : ""}`).join("; ")],
    ["crashes", known.health[alias]?.crashes ? number(known.health[alias].crashes) : ""],
  ]);
  drawMemory(model, card);
  putFacts(element("model-about"), [
    ["description", card.description],
    ["further names", names?.join(", ")],
    ["capabilities", card.capabilities?.join(", ")],
    ["context", contextOf(model, card)],
    ["quantization", card.quantization],
    ["family", card.family],
    ["parameters", card.parameters && inWords(card.parameters)],
    ["size on disk", card.size && bytes(card.size)],
    ["found in", card.source ?? model.source],
  ]);
  show(element("model-waiting"), ofQueue?.queue_length);
  showWaiting(ofQueue?.queue_length ? rowsOf(alias, ofQueue, queueSeenAt, SHOWN_WAITING) : []);
  const exit = known.health[alias]?.last_exit;
  show(element("model-exit"), exit);
  if (exit) {
    put(element("model-exit-reason"), `${at(exit.at * 1000)}: ${exit.reason}${exit.out_of_memory ? " (out of memory)" : ""}`);
    put(element("model-exit-log"), exit.log_tail.join("\n"));
    show(element("model-exit-log"), exit.log_tail.length);
  }
  const decided = known.decisions.filter((decision) => decision.model === alias);
  showDecisions(decided);
  show(element("model-undecided"), !decided.length);
  const command = (details?.command ?? []).map(quotedForShells).join(" ");
  put(element("model-command"), command);
  show(element("model-command-section"), command);
}

const quotedForShells = (word) =>
  /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'"'"'`)}'`;

const inWords = (count) => (count < 1e9 ? `${(count / 1e6).toPrecision(3)} million` : `${(count / 1e9).toPrecision(3)} billion`);

const at = (when) => new Date(when).toLocaleString("en-GB");

function sleepOf(sleep) {
  if (!sleep) return "";
  return sleep.problem ?? (sleep.wake_sec === null ? "possible" : `wakes in ${duration(sleep.wake_sec)}`);
}

function contextOf(model, card) {
  const trained = card.meta?.n_ctx_train;
  const served = model.context_length ?? card.n_ctx;
  if (!served) return "";
  return trained && trained !== served ? `${tokens(served)} of ${tokens(trained)} that it was made for` : tokens(served);
}

const byDevice = (mib) =>
  Object.entries(mib ?? {})
    .filter(([, each]) => each)
    .map(([device, each]) => `${size(each)} on ${device}`)
    .join(", ");

function drawMemory({ memory }) {
  putFacts(element("model-memory"), [
    ["booked", byDevice(memory?.booked_mb)],
    ["measured", byDevice(memory?.measured_mb)],
    ["estimated", byDevice(memory?.estimated_mb)],
    ["asleep", byDevice(memory?.asleep_mb)],
    ["source", memory?.source ?? forecast?.source],
    ["would take", memory ? "" : forecast && (forecast.message || "asking …")],
    ["context", memory?.context ? tokens(memory.context) : ""],
    ["flags added", memory?.added_flags.join(" ")],
    ["remark", memory?.remark],
  ]);
  const facts = element("model-memory");
  show(facts.parentElement, facts.children.length);
}

// --- what is done with it ------------------------------------------------------------------------------------

function drawKeep(model) {
  const select = element("model-keep");
  if (document.activeElement === select) return;
  const { pinned, pinned_until: until } = model;
  const now = until
    ? `kept until ${new Date(until).toLocaleString("en-GB", { weekday: "short", hour: "2-digit", minute: "2-digit" })}`
    : pinned
      ? "pinned by its configuration"
      : "kept as configured";
  const key = `${now}`;
  if (select.dataset.drawn === key) return;
  select.dataset.drawn = key;
  const choices = pinned && !until ? [] : KEEP_MORE.filter(([value]) => value || until);
  select.replaceChildren(
    new Option(now, "now"),
    ...choices.map(([value, words]) => new Option(value ? `keep loaded ${words}` : `keep ${words}`, value)),
  );
}

async function keep(choice) {
  if (choice === "now") return;
  const of = alias;
  try {
    const answer = await send(`v1/models/${quoted(of)}/keep`, untilWhen(choice));
    const { message, pinned, pinned_until } = await answer.json();
    announce(message);
    known.models.set(of, { ...known.models.get(of), pinned, pinned_until });
    if (choice && known.models.get(of).status === "off") act(of, "Load");
  } catch (error) {
    tell(`${of}: ${error.message}`);
  }
  element("model-keep").value = "now";
  element("model-keep").dataset.drawn = "";
  element("model-manage").focus(); // the choices are made anew
  changed();
}

function untilWhen(choice) {
  if (choice !== "tomorrow") return choice ? { for_sec: Number(choice) } : {};
  const tomorrow = new Date();
  tomorrow.setDate(tomorrow.getDate() + 1);
  tomorrow.setHours(8, 0, 0, 0);
  return { until: tomorrow.toISOString() };
}

async function remove() {
  const of = alias;
  if (!(await sure(`Remove ${of}, and the files that only it uses? It would have to be pulled again.`, "Remove"))) return;
  try {
    const answer = await ask(`v1/models/pulled/${quoted(of)}`, { method: "DELETE" });
    const { freed_bytes: freed } = await answer.json();
    announce(`${of} is removed, ${bytes(freed)} are free again`);
    location.hash = "#/models";
  } catch (error) {
    tell(`${of}: ${error.message}`);
  }
}
