// One request, and what happened to it.

import { allow, bytes, duration, element, link, list, number, plain, put, show } from "../drawing.js";
import { changed } from "../known.js";
import { addressOf } from "../routes.js";
import { get, Refused } from "../router.js";
import { cancel, pathOf, pending } from "./commands.js";
import { isLive, outcomeOf, progress } from "./known.js";

let wantedId = null; // the one that is shown
let request = null; // as it was told last
let seenAt = 0;
let problem = "";

const PHASES = { received: "receiving", queued: "waiting", loading: "loading", ready: "waiting" };
const OF_ITS_OWN = { granted: "prompt", retried: "waiting", first_token: "answer" };

export function openDetails(id) {
  if (id === wantedId) return;
  [wantedId, request, problem] = [id, null, ""];
}

let showFacts;
let showBar;
let showLegend;
let showEvents;

export function startDetails() {
  element("request-cancel").addEventListener("click", async () => {
    await cancel(wantedId);
    request = null; // asked for again
    await askForDetails();
  });
  showFacts = list(
    element("request-facts"),
    () => {
      const root = document.createElement("div");
      root.append(document.createElement("dt"), document.createElement("dd"));
      return { root };
    },
    ([name]) => name,
    ({ root }, [name, text, address]) => {
      put(root.firstElementChild, name);
      const value = root.lastElementChild;
      if (!address) return put(value, text);
      if (!value.firstElementChild) value.append(document.createElement("a"));
      put(value.firstElementChild, text);
      link(value.firstElementChild, address);
    },
  );
  showBar = list(
    element("request-bar"),
    plain("span"),
    (part) => part.key,
    ({ root }, { phase, seconds }) => {
      put(root, `phase-${phase}`, "className");
      put(root.style, String(Math.ceil(seconds * 1e4)), "flexGrow"); // together more than 1
      put(root, `${phase} ${duration(seconds)}`, "title");
    },
  );
  showLegend = list(
    element("request-legend"),
    plain("li"),
    (part) => part.phase,
    ({ root }, { phase, seconds }) => {
      put(root, `phase-${phase}`, "className");
      put(root, `${phase} ${duration(seconds)}`);
    },
  );
  showEvents = list(
    element("request-events"),
    plain("tr"),
    (event) => event.key,
    ({ root }, { after, event, detail }) => {
      while (root.children.length < 3) root.append(document.createElement(root.children.length === 1 ? "th" : "td"));
      root.children[1].scope = "row";
      put(root.children[0], `+${duration(after)}`);
      put(root.children[1], event.replaceAll("_", " "));
      put(root.children[2], detail);
    },
  );
}

/** What has ended does not change any more. */
export async function askForDetails() {
  if (request && !isLive(request)) return;
  const id = wantedId;
  try {
    const told = await get(pathOf(id));
    if (id !== wantedId) return;
    [request, seenAt, problem] = [told, performance.now(), ""];
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (id === wantedId) problem = error.message;
  }
  changed();
}

export function drawDetails() {
  put(element("request-title"), `Request ${wantedId}`);
  put(element("request-problem"), problem);
  show(element("request-problem"), problem);
  show(element("request-story"), request);
  show(element("request-cancel"), request && isLive(request));
  allow(element("request-cancel"), !pending.has(wantedId));
  if (!request) return;
  const { status, reason, arrived_at: arrived } = request;
  const passed = isLive(request) ? (performance.now() - seenAt) / 1000 : 0;
  const total = request.total_sec + passed;
  put(element("request-state"), [outcomeOf(request), status, progress(request)].filter(Boolean).join(" · "));
  put(element("request-story").dataset, request.outcome ?? request.state, "outcome");
  put(element("request-reason"), reason ?? "");
  showFacts(factsOf({ ...request, total_sec: total }).filter(([, text]) => text));
  const parts = phasesOf(request.timeline, arrived, total);
  showBar(parts);
  put(
    element("request-bar"),
    parts.map(({ phase, seconds }) => `${phase} ${duration(seconds)}`).join(", ") || "nothing yet",
    "ariaLabel",
  );
  showLegend(summed(parts));
  showEvents(
    request.timeline.map((event, index) => ({ ...event, key: index, after: secondsFrom(arrived, event.at) })),
  );
  show(element("request-capture"), request.capture);
  for (const part of ["request", "answer"]) put(element(`captured-${part}`), pretty(request.capture?.[part] ?? ""));
}

const secondsFrom = (begin, at) => Math.max(0, (new Date(at) - new Date(begin)) / 1000);

/** What it was doing, one after the other: `{key, phase, seconds}`. */
function phasesOf(timeline, arrived, total) {
  const parts = [];
  let phase = timeline[0]?.event === "received" ? "receiving" : "waiting";
  let since = 0;
  const end = (at) => {
    if (at > since) parts.push({ key: `${parts.length} ${phase}`, phase, seconds: at - since });
    since = Math.max(at, since);
  };
  for (const { event, model, at } of timeline) {
    const isWaiting = ["waiting", "loading"].includes(phase);
    const isOfIts = model === undefined || (model === request.model && isWaiting);
    const next = isOfIts && (model === undefined ? OF_ITS_OWN[event] : PHASES[event]);
    if (next && next !== phase) {
      end(secondsFrom(arrived, at));
      phase = next;
    }
  }
  end(total);
  return parts;
}

function summed(parts) {
  const sums = new Map();
  for (const { phase, seconds } of parts) sums.set(phase, (sums.get(phase) ?? 0) + seconds);
  return [...sums].map(([phase, seconds]) => ({ phase, seconds }));
}

function factsOf(request) {
  const { model, ttft_sec: first, total_sec: total, output_tokens: out, cached_tokens: cached } = request;
  const pace = out > 1 && first !== null && total - first > 0.05 ? ` (${(out / (total - first)).toFixed(1)}/s)` : "";
  return [
    ["Model", model, model && addressOf(model)],
    ["Client", [request.client, request.peer].filter(Boolean).join(" at ")],
    ["Route", request.route + (request.streamed ? ", as a stream" : "")],
    ["Priority", request.priority],
    ["Arrived", new Date(request.arrived_at).toLocaleString("en-GB")],
    ["Waited", duration(request.waited_sec)],
    ["of that, for loading", request.load_sec ? duration(request.load_sec) : ""],
    ["First token", first === null ? "" : duration(first)],
    ["Total", duration(total)],
    ["Tokens in", request.prompt_tokens === null ? "" : number(request.prompt_tokens)],
    ["of them cached", cached ? `${number(cached)}${request.kv ? ` (${request.kv})` : ""}` : ""],
    ["Tokens out", out === null ? "" : number(out) + pace],
    ["Engine", request.engine],
    ["Expected wait", request.expected_wait_sec === null ? "" : duration(request.expected_wait_sec)],
    ["Size", `${bytes(request.request_bytes)} in, ${bytes(request.answer_bytes)} out`],
    ["Retries", request.retries ? String(request.retries) : ""],
  ];
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}
