// Who waits, and why: of all models, or of one.

import { ago, counted, duration, element, link, list, number, plain, put, putCells, show } from "../drawing.js";
import { address, addressOf } from "../routes.js";

const MOST_SHOWN = 8;

/** Makes the children of `body` those who wait; the returned function is called with `rowsOf` models. */
export const waitingIn = (body) => list(body, plain("tr"), (row) => row.key, fill);

export function rowsOf(alias, { by_priority: counts, queue_length: length, waiting }, seenAt, most = MOST_SHOWN) {
  const rows = [{ key: `model ${alias}`, alias, why: waiting[0]?.why ?? "" }];
  for (const request of waiting.slice(0, most)) {
    rows.push({ key: `request ${request.id}`, request, passed: ago(seenAt) });
  }
  const more = length - Math.min(most, waiting.length);
  if (more) rows.push({ key: `more ${alias}`, alias: "", why: `… and ${number(more)} more (${counted(counts)})` });
  return rows;
}

const soon = (left) => (left < 0.5 ? "soon" : `in ~${duration(left)}`);

/** A request; or what can be said of all that wait for a model. */
function fill({ root }, { request, passed, alias, why }) {
  if (request) {
    const waited = duration(request.waited_sec + passed);
    const expected = request.expected_wait_sec === null ? "unknown" : soon(request.expected_wait_sec - passed);
    if (!root.children.length) {
      putCells(root, ["", "", "", "", ""]);
      root.lastElementChild.append(document.createElement("span"), document.createElement("a"));
    }
    putCells(root, [`${request.position}.`, request.priority, waited, expected]);
    const [client, id] = root.lastElementChild.children;
    put(client, request.client ? `${request.client} · ` : "");
    put(id, request.id);
    link(id, address("requests", [request.id]));
  } else {
    if (!root.children.length) {
      const cell = root.appendChild(document.createElement("td"));
      cell.colSpan = 5;
      cell.append(document.createElement(alias ? "a" : "b"), " ", document.createElement("span"));
    }
    const [name, said] = root.firstElementChild.children;
    put(name, alias);
    if (alias) link(name, addressOf(alias));
    put(said, why);
  }
}

let showWaiting;

export function drawQueue({ queue, queueSeenAt }) {
  if (!queue) return;
  showWaiting ??= waitingIn(element("waiting-rows"));
  const oldest = ([, { waiting }]) => Math.max(0, ...waiting.map((request) => request.waited_sec));
  const queues = Object.entries(queue.per_model).filter(([, { queue_length: length }]) => length);
  queues.sort((one, other) => oldest(other) - oldest(one));
  const priorities = {};
  for (const [, { by_priority: counts }] of queues) {
    for (const name in counts) priorities[name] = (priorities[name] ?? 0) + counts[name];
  }
  put(element("waiting-counts"), counted(priorities) || "Nobody waits.");
  show(element("waiting-head"), queues.length);
  showWaiting(queues.flatMap(([alias, model]) => rowsOf(alias, model, queueSeenAt)));
}
