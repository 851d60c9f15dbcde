// The requests that the router tells of: live ones as they are, and the last ones that have ended.

import { get } from "../router.js";

const MOST = 1000;

export const requests = {
  live: [],
  ended: [], // the last first
  kept: MOST,
  total: 0,
  capture: 0, // of so many, bodies are kept
  seenAt: 0, // on the clock of `performance.now()`; 0: nothing is known yet
};

let cursor = "";

/** Asks what is new. Only live requests, and those that have ended since, are told again. */
export async function refresh() {
  const asked = cursor;
  const answer = await get(`v1/requests?limit=${MOST}${asked && `&since=${encodeURIComponent(asked)}`}`);
  const told = answer.requests;
  if (!answer.since) requests.ended = []; // the router has been started again, or this is the first answer
  requests.live = told.filter(isLive);
  addEnded(told.filter((request) => !isLive(request)));
  const { kept, total, capture } = answer;
  Object.assign(requests, { kept, total, capture, seenAt: performance.now() });
  cursor = answer.cursor;
  requests.ended.length = Math.min(requests.ended.length, kept, MOST);
  nameThem();
}

/** A request has ended, before the router is asked again. */
export function noteEnded(request) {
  requests.live = requests.live.filter(({ id }) => id !== request.id);
  addEnded([request]);
  nameThem();
}

/** Adds those that are not known yet. */
function addEnded(told) {
  const news = new Set(told.map(({ number }) => number));
  requests.ended = [...told, ...requests.ended.filter(({ number }) => !news.has(number))];
}

/** Gives each a key, which it keeps when it ends. Of several with one id, which may be the client's, the last has it. */
function nameThem() {
  const seen = new Set();
  for (const request of [...requests.live, ...requests.ended]) {
    request.key = seen.has(request.id) ? `${request.id} ${request.number ?? request.arrived_at}` : request.id;
    seen.add(request.key);
    request.words ??= [
      ...[request.id, request.model, request.client, request.peer, request.route, request.priority, request.state],
      ...[request.outcome, request.engine, request.status, request.reason],
    ].join(" ");
  }
}

/** Seconds since it came: a live one goes on while nobody asks. */
export const lasted = ({ state, total_sec: total }) =>
  state === "done" ? total : total + (performance.now() - requests.seenAt) / 1000;

export const isLive = ({ state }) => state !== "done";

export const outcomeOf = ({ state, outcome }) => (outcome ?? state).replaceAll("_", " ");

/** What there is to say of a live one beside its state. */
export function progress({ state, position, why, output_tokens: tokens, total_sec, ttft_sec, answer_bytes: size }) {
  if (state === "queued") return [position && `${position}.`, why].filter(Boolean).join(" ");
  if (state !== "streaming") return "";
  if (!tokens) return `${size} bytes`;
  const seconds = total_sec - ttft_sec;
  const pace = seconds > 0.5 ? `, ${(tokens / seconds).toFixed(1)}/s` : "";
  return `${tokens} tokens${pace}`;
}
