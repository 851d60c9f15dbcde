// What the page shows of what is known: one function a section.

import {
  ago,
  bytes,
  counted,
  duration,
  element,
  list,
  lists,
  number,
  perSec,
  plain,
  put,
  secondsBetween,
  show,
  size,
  stamp,
  tokens,
} from "./drawing.js";

// --- models --------------------------------------------------------------------------------------------------

const RANK = { failed: 0, loading: 1, draining: 1, stopping: 1, ready: 1, asleep: 2, off: 3 };
const ACTIONS = {
  off: "Load",
  failed: "Reset",
  loading: "Unload",
  ready: "Unload",
  asleep: "Unload",
  draining: "Unload",
  stopping: "",
};

const showModels = list(
  element("model-rows"),
  () => stamp("model-row"),
  (model) => model.alias,
  fillModel,
);

export function drawModels(known) {
  const models = [...known.models.values()];
  const wanted = element("filter").value.trim().toLowerCase();
  const shown = models.filter((model) =>
    [model.alias, model.status, model.source ?? "", ...(known.names.get(model.alias) ?? [])].some((text) =>
      text.toLowerCase().includes(wanted),
    ),
  );
  shown.sort((one, other) => RANK[one.status] - RANK[other.status]);
  showModels(shown.map((model) => ({ ...model, known })));
  const states = {};
  for (const { status } of models) states[status] = (states[status] ?? 0) + 1;
  put(element("counts"), counted(states));
  show(element("filter"), models.length > 5);
  const none = models.length
    ? "No model matches the filter."
    : "No models are configured: start the router with --models-dir, name some in its configuration, or pull one.";
  put(element("no-models"), none);
  show(element("no-models"), !shown.length);
}

function fillModel(row, model) {
  const { known, alias, status } = model;
  const queue = known.queue?.per_model[alias];
  const inFlight = queue?.current_processing ?? model.in_flight;
  const [progress, told] = status === "loading" && model.load ? load(model) : [null, ""];
  const waits = waitsForLoad(model);
  put(row.root.dataset, status, "state");
  put(row.root.dataset, alias, "alias");
  put(row.alias, alias);
  const why = told || (waits && model.why_waiting);
  put(row.about, why || trouble(model) || queue?.waiting[0]?.why || description(model));
  put(row.about, !why && trouble(model) ? "error" : "dim", "className");
  const share = progress !== null && model.load.fraction ? ` ${Math.round(100 * progress)} %` : "";
  put(row.state, waits ? "waiting" : `${status}${share}`);
  show(row.progress, progress !== null);
  put(row.progress, progress ?? 0, "value");
  put(row.progress, `How far ${alias} is loaded`, "ariaLabel");
  put(row.slots, model.started_at ? `${inFlight}/${model.slots}` : "");
  put(row.queue, counted(queue?.by_priority ?? {}));
  put(row.memory, places(model.memory?.booked_mb ?? {}, known));
  put(row.leaves, leaves(model, inFlight));
  const action = waits ? "Cancel" : ACTIONS[status];
  put(row.manage, action);
  put(row.manage, `${action} ${alias}`, "ariaLabel");
  put(row.manage, known.pending.has(alias), "disabled");
  show(row.manage, known.manages && action);
  show(row.log, known.manages);
  put(row.log, `Log of ${alias}`, "ariaLabel");
  show(row.chat, canChat(known.cards.get(alias)));
  put(row.chat, `Chat with ${alias}`, "ariaLabel");
}

/** Whether it is to be loaded by hand once there is room. */
export const waitsForLoad = ({ status, load_asked_at }) => status === "off" && Boolean(load_asked_at);

/** Its share, by the engine's own word or else by the time that it takes; and the words for it. */
function load({ load: { stage, fraction, elapsed_sec, expected_sec }, load_sec: measured, seenAt }) {
  const elapsed = elapsed_sec + ago(seenAt);
  const share = fraction ?? Math.min(elapsed / expected_sec, 0.99);
  const expected = `${measured ? "~" : "perhaps "}${duration(expected_sec)}`;
  return [share, `${duration(elapsed)} of ${expected}${stage ? `: ${stage.replaceAll("_", " ")}` : ""}`];
}

const trouble = ({ status, error_message }) => (["off", "failed"].includes(status) && error_message) || "";

function description({ alias, source, known }) {
  const card = known.cards.get(alias) ?? {};
  const names = known.names.get(alias);
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

function leaves(model, inFlight) {
  if (!["ready", "asleep"].includes(model.status)) return "";
  if (inFlight || model.slotless) return "busy";
  if (model.unload_at === null) return model.pinned ? "pinned" : "kept";
  const left = secondsBetween(model.updated_at, model.unload_at) - ago(model.seenAt);
  return `in ${duration(Math.max(0, Math.round(left)))}`;
}

/** As far as it is known. */
export const canChat = (card) => !card?.capabilities || card.capabilities.includes("completion");

// --- memory --------------------------------------------------------------------------------------------------

const colours = new Map();
const colour = (alias) => {
  if (!colours.has(alias)) colours.set(alias, colours.size % 6);
  return `colour-${colours.get(alias)}`;
};

const showDevices = list(
  element("devices"),
  () => stamp("device-row"),
  (device) => device.name,
  fillDevice,
);
const showBar = lists(
  plain("span"),
  (part) => part.key,
  (segment, part) => {
    put(segment.root, part.look, "className");
    put(segment.root, `${part.name} ${size(part.mib)}`, "title");
    put(segment.root.style, String(part.mib), "flexGrow");
  },
);
const showLegend = lists(
  plain("li"),
  (part) => part.key,
  (entry, part) => {
    put(entry.root, part.look, "className");
    put(entry.root, `${part.name} ${size(part.mib)}`);
  },
);

export function drawMemory({ vram }) {
  if (vram) showDevices(vram.devices.map((device) => ({ ...device, models: vram.models })));
}

function fillDevice(row, device) {
  const { name } = device;
  const models = device.models
    .filter((model) => model.booked_mb[name])
    .map((model) => ({
      key: `model ${model.model_alias}`,
      name: model.status === "loading" ? `${model.model_alias} (reserved)` : model.model_alias,
      mib: model.booked_mb[name],
      look: `${colour(model.model_alias)} ${model.status === "loading" ? "reserved" : ""}`,
    }));
  const rest = [
    { key: "external", name: "others", mib: device.external_mb, look: "external" },
    { key: "free", name: "free for models", mib: device.free_for_new_model_mb, look: "free" },
    { key: "kept", name: "kept free", mib: device.reserve_mb, look: "kept" },
  ];
  const parts = [...models, ...rest].filter((part) => part.mib > 0);
  put(row.name, name);
  put(row.label, device.label ?? "");
  const figures = [
    `${size(device.booked_mb)} models of ${size(device.total_mb)}`,
    device.utilization !== null && `${Math.round(100 * device.utilization)} % busy`,
    device.temperature_c !== null && `${Math.round(device.temperature_c)} °C`,
    device.power_w !== null && `${Math.round(device.power_w)} W`,
  ];
  put(row.figures, figures.filter(Boolean).join(" · "));
  showBar(row.bar, parts);
  put(row.bar, `${name}: ${parts.map((part) => `${part.name} ${size(part.mib)}`).join(", ")}`, "ariaLabel");
  showLegend(row.legend, parts);
}

// --- the queue -----------------------------------------------------------------------------------------------

const MOST_SHOWN = 8;

const showWaiting = list(element("waiting-rows"), plain("tr"), (row) => row.key, fillWaiting);

export function drawQueue({ queue, queueSeenAt }) {
  if (!queue) return;
  const oldest = ([, { waiting }]) => Math.max(0, ...waiting.map((request) => request.waited_sec));
  const queues = Object.entries(queue.per_model).filter(([, { queue_length: length }]) => length);
  queues.sort((one, other) => oldest(other) - oldest(one));
  const priorities = {};
  const rows = [];
  for (const [alias, { by_priority: counts, queue_length: length, waiting }] of queues) {
    for (const name in counts) priorities[name] = (priorities[name] ?? 0) + counts[name];
    rows.push({ key: `model ${alias}`, alias, why: waiting[0]?.why ?? "" });
    for (const request of waiting.slice(0, MOST_SHOWN)) {
      rows.push({ key: `request ${request.id}`, request, passed: ago(queueSeenAt) });
    }
    const more = length - Math.min(MOST_SHOWN, waiting.length);
    if (more) rows.push({ key: `more ${alias}`, alias: "", why: `… and ${number(more)} more` });
  }
  put(element("waiting-counts"), counted(priorities) || "Nobody waits.");
  show(element("waiting-head"), rows.length);
  showWaiting(rows);
}

const soon = (left) => (left < 0.5 ? "soon" : `in ~${duration(left)}`);

/** A request; or what can be said of all that wait for a model. */
function fillWaiting({ root }, { request, passed, alias, why }) {
  if (request) {
    const waited = duration(request.waited_sec + passed);
    const expected = request.expected_wait_sec === null ? "unknown" : soon(request.expected_wait_sec - passed);
    const who = [request.client, request.id].filter(Boolean).join(" · ");
    putCells(root, [`${request.position}.`, request.priority, waited, expected, who]);
  } else {
    if (!root.children.length) {
      const cell = root.appendChild(document.createElement("td"));
      cell.colSpan = 5;
      cell.append(document.createElement("b"), " ", document.createElement("span"));
    }
    put(root.querySelector("b"), alias);
    put(root.querySelector("span"), why);
  }
}

function putCells(row, texts) {
  while (row.children.length < texts.length) row.append(document.createElement("td"));
  texts.forEach((text, index) => put(row.children[index], text));
}

// --- requests and decisions ----------------------------------------------------------------------------------

const showFigures = list(
  element("request-rows"),
  plain("tr"),
  ([name]) => name,
  ({ root }, texts) => putCells(root, texts),
);

export function drawRequests({ telemetry }) {
  if (!telemetry) return;
  const windows = [telemetry.windows["1m"], telemetry.windows["5m"]];
  const outcomes = [...new Set(windows.flatMap((window) => Object.keys(window.outcomes)))].sort(
    (one, other) => (other === "served") - (one === "served") || one.localeCompare(other),
  );
  const seconds = [60, 300];
  const times = (name) =>
    windows.map(({ [name]: { p50, p95 } }) => (p50 === null ? "–" : `${duration(p50)} / ${duration(p95)}`));
  showFigures([
    ...(outcomes.length ? outcomes : ["served"]).map((name) => [
      name.replaceAll("_", " "),
      ...windows.map((window) => number(window.outcomes[name] ?? 0)),
    ]),
    [
      "tokens out",
      ...windows.map(
        (window, index) => `${number(window.output_tokens)} (~${perSec(window.output_tokens, seconds[index])}/s)`,
      ),
    ],
    ["tokens in", ...windows.map((window) => number(window.prompt_tokens))],
    ["of them cached", ...windows.map((window) => number(window.cached_tokens))],
    ["waited", ...times("queue_sec")],
    ["first token", ...times("ttft_sec")],
    ["whole", ...times("total_sec")],
  ]);
  const turnedAway = counted(telemetry.turned_away).replaceAll("_", " ");
  const served = `${number(telemetry.successful)} of ${number(telemetry.total_requests)} served since the start`;
  put(element("since-start"), turnedAway ? `${served}; turned away: ${turnedAway}` : served);
}

// --- conversations on disk -----------------------------------------------------------------------------------

const showKept = list(
  element("kv-rows"),
  plain("tr"),
  (row) => row.alias,
  ({ root }, { alias, count, bytes: onDisk, since_start: { restores, prefill_saved_sec: spared } }) =>
    putCells(root, [alias, number(count), bytes(onDisk), number(restores), duration(spared)]),
);

export function drawKept({ kv, manages }) {
  show(element("kv"), manages && kv?.enabled);
  if (!kv) return;
  const { total, limits, models } = kv;
  put(element("kv-counts"), `${number(total.count)}, ${bytes(total.bytes)} of ${bytes(limits.bytes)}`);
  showKept(Object.entries(models).map(([alias, kept]) => ({ alias, ...kept })));
}

const showDecisions = list(
  element("decision-rows"),
  plain("li"),
  (decision) => decision.key,
  ({ root }, decision) => {
    if (root.children.length) return; // it never changes
    const part = (tag, text, name = "") => {
      const node = document.createElement(tag);
      node.className = name;
      node.textContent = text;
      root.append(node, " ");
    };
    root.dataset.state = decision.state;
    part("time", new Date(decision.at).toLocaleTimeString("en-GB"), "dim");
    part("b", decision.about);
    part("span", decision.state, "state");
    part("span", decision.reason, "reason");
  },
);

export function drawDecisions({ decisions }) {
  showDecisions(decisions);
  show(element("no-decisions"), !decisions.length);
}

// --- pulls ---------------------------------------------------------------------------------------------------

const showPulls = list(
  element("pull-rows"),
  () => stamp("pull-row"),
  (pull) => pull.id,
  (row, pull) => {
    const running = isRunning(pull);
    const rate = pull.bytes_per_sec ? `, ${bytes(pull.bytes_per_sec)}/s` : "";
    const left = pull.eta_sec ? `, ${duration(pull.eta_sec)} left` : "";
    const amount = pull.total_bytes ? ` ${bytes(pull.completed_bytes)} of ${bytes(pull.total_bytes)}` : "";
    const memory = running && pull.memory && !pull.memory.fits ? "; it will not fit into memory as it is" : "";
    row.root.dataset.pull = pull.id;
    row.root.dataset.state = pull.status;
    put(row.name, pull.alias ?? pull.reference);
    put(
      row.status,
      `${pull.status}${running ? `${amount}${rate}${left}${memory}` : ""}${pull.error ? `: ${pull.error.message}` : ""}`,
    );
    show(row.cancel, running);
    show(row.progress, running);
    row.progress.value = pull.total_bytes ? pull.completed_bytes / pull.total_bytes : 0;
  },
);

export const isRunning = (pull) => ["resolving", "downloading"].includes(pull.status);

export function drawPulls({ pulls, manages }) {
  show(element("pulls"), manages);
  show(element("log"), manages);
  showPulls([...pulls].reverse().slice(0, 5));
}

// --- the head ------------------------------------------------------------------------------------------------

export function drawHead({ server, queue, telemetry, startedAt }, lostSince) {
  put(
    element("server"),
    lostSince ? "no answer, reconnecting …" : (server?.status ?? "connecting …").replace("_", " "),
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
