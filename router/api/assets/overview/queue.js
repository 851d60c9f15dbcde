// Who waits, and why.

import { ago, counted, duration, element, link, list, number, plain, put, putCells, show } from "../drawing.js";
import { address } from "../routes.js";

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
    putCells(root, [`${request.position}.`, request.priority, waited, expected]);
    if (root.children.length < 5) {
      const cell = root.appendChild(document.createElement("td"));
      cell.append(document.createElement("span"), document.createElement("a"));
    }
    const [client, name] = root.children[4].children;
    put(client, request.client ? `${request.client} · ` : "");
    put(name, request.id);
    link(name, address("requests", [request.id]));
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

