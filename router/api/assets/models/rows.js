// Rows of models, as the overview and the list of models show them, and what their buttons do.

import { ago, allow, bytes, counted, duration, link, list, put, secondsBetween, show, size, stamp, tokens } from "../drawing.js";
import { canChat, waitsForLoad } from "../known.js";
import { address, addressOf } from "../routes.js";
import { act } from "./commands.js";

const ACTIONS = {
  off: "Load",
  failed: "Reset",
  loading: "Unload",
  ready: "Unload",
  asleep: "Unload",
  draining: "Unload",
  stopping: "Unload",
};

/** Makes the children of `body` rows of models; the returned function is called with them. */
export function rowsOf(body) {
  body.addEventListener("click", ({ target }) => {
    const button = target.closest("button");
    if (button) act(button.closest("tr").dataset.alias, button.textContent);
  });
  const draw = list(
    body,
    () => stamp("model-row"),
    ({ model }) => model.alias,
    (row, { model, known }) => fill(row, model, known),
  );
  return (models, known) => draw(models.map((model) => ({ model, known })));
}

/**
 * The order of rows: as given, but as it was while the pointer or the focus is among them, so that nobody presses
 * the button of another model than intended.
 */
export function held(body) {
  let before = [];
  return (models) => {
    if (body.matches(":hover, :focus-within")) {
      const places = new Map(before.map((alias, index) => [alias, index]));
      const place = ({ alias }) => places.get(alias) ?? Infinity;
      models.sort((one, other) => place(one) - place(other) || 0);
    }
    before = models.map(({ alias }) => alias);
    return models;
  };
}

function fill(row, model, known) {
  const { alias, status } = model;
  const queue = known.queue?.per_model[alias];
  const [card, names] = [known.cards.get(alias), known.names.get(alias)];
  const drawn = [model, queue, card, names, known.pending.has(alias), known.manages];
  if (status === "off" && row.drawn?.every((each, index) => each === drawn[index])) return; // as are most of many
  row.drawn = drawn;
  const inFlight = queue?.current_processing ?? model.in_flight;
  const [progress] = status === "loading" && model.load ? load(model) : [null];
  put(row.root.dataset, status, "state");
  put(row.root.dataset, alias, "alias");
  put(row.alias, alias);
  link(row.alias, addressOf(alias));
  const [said, isTrouble] = why(model, known);
  put(row.about, said || description(model, card, names));
  put(row.about, isTrouble ? "error" : "dim", "className");
  put(row.state, stateOf(model));
  show(row.progress, progress !== null);
  put(row.progress, progress ?? 0, "value");
  put(row.progress, `How far ${alias} is loaded`, "ariaLabel");
  put(row.slots, model.started_at ? `${inFlight}/${model.slots}` : "");
  put(row.queue, counted(queue?.by_priority ?? {}));
  put(row.memory, places(model.memory?.booked_mb ?? {}, known));
  put(row.leaves, leaves(model, inFlight));
  const action = actionOf(model);
  put(row.manage, action);
  put(row.manage, `${action} ${alias}`, "ariaLabel");
  allow(row.manage, !known.pending.has(alias) && status !== "stopping");
  show(row.manage, known.manages);
  show(row.log, known.manages);
  link(row.log, addressOf(alias, "logs"));
  put(row.log, `Log of ${alias}`, "ariaLabel");
  show(row.chat, canChat(card));
  link(row.chat, address("chat", [], { model: alias }));
  put(row.chat, `Chat with ${alias}`, "ariaLabel");
}

/** What its button does. */
export const actionOf = (model) => (waitsForLoad(model) ? "Cancel" : ACTIONS[model.status]);

export function stateOf(model) {
  if (waitsForLoad(model)) return "waiting";
  const share = model.status === "loading" && model.load?.fraction ? ` ${Math.round(100 * load(model)[0])} %` : "";
  return `${model.status}${share}`;
}

/** What there is to say of its state, and whether that is trouble. */
export function why(model, known) {
  const told = model.status === "loading" && model.load ? load(model)[1] : "";
  const said = told || (waitsForLoad(model) && model.why_waiting);
  if (said) return [said, false];
  const problem = trouble(model);
  return [problem || known.queue?.per_model[model.alias]?.waiting[0]?.why || "", Boolean(problem)];
}

/** Its share, by the engine's own word or else by the time that it takes; and the words for it. */
function load({ load: { stage, fraction, elapsed_sec, expected_sec }, load_sec: measured, seenAt }) {
  const elapsed = elapsed_sec + ago(seenAt);
  const share = fraction ?? Math.min(elapsed / expected_sec, 0.99);
  const expected = `${measured ? "~" : "perhaps "}${duration(expected_sec)}`;
  return [share, `${duration(elapsed)} of ${expected}${stage ? `: ${stage.replaceAll("_", " ")}` : ""}`];
}

const trouble = ({ status, error_message }) => (["off", "failed"].includes(status) && error_message) || "";

function description({ source }, card = {}, names) {
  return [
    card.description,
    names && `also ${names.join(", ")}`,
    card.quantization,
    card.size && bytes(card.size),
    card.n_ctx && `${tokens(card.n_ctx)} context`,
    card.capabilities?.filter((name) => name !== "completion").join(", "),
    source?.split("/").pop(),
  ]
    .filter(Boolean)
    .join(" · ");
}

function places(booked, known) {
  const names = Object.keys(booked).filter((device) => booked[device]);
  const several = (known.vram?.devices.length ?? 0) > 1;
  return names.map((device) => (several ? `${device} ${size(booked[device])}` : size(booked[device]))).join("\n");
}

const clock = (when) => new Date(when).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });

export function leaves(model, inFlight) {
  if (!["ready", "asleep"].includes(model.status)) return "";
  if (inFlight || model.slotless) return "busy";
  if (model.pinned_until) return `kept until ${clock(model.pinned_until)}`;
  if (model.unload_at === null) return model.pinned ? "pinned" : "kept";
  const left = secondsBetween(model.updated_at, model.unload_at) - ago(model.seenAt);
  return `in ${duration(Math.max(0, Math.round(left)))}`;
}
