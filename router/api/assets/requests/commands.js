// What can be done to a request.

import { announce } from "../drawing.js";
import { changed } from "../known.js";
import { tell } from "../notice.js";
import { ask, Refused } from "../router.js";
import { noteEnded } from "./known.js";

const ENDED = [404, 409];

/** Ids of requests that are being cancelled. */
export const pending = new Set();

export async function cancel(id) {
  pending.add(id);
  changed();
  try {
    const answer = await ask(pathOf(id), { method: "DELETE" });
    noteEnded(await answer.json());
    announce("The request is cancelled.");
  } catch (error) {
    if (!(error instanceof Refused && ENDED.includes(error.status))) tell(error.message); // else the list tells
  } finally {
    pending.delete(id);
    changed();
  }
}

export const pathOf = (id) => `v1/requests/${encodeURIComponent(id)}`;
