// What is done with models: commands to the router, by the names of their buttons.

import { changed, known } from "../known.js";
import { tell } from "../notice.js";
import { get, quoted, send } from "../router.js";

/** Does what a model's button says. */
export function act(alias, what) {
  if (what === "Load") command(alias, "v1/models/load", { model: alias, wait: false });
  else if (what === "Unload" || what === "Cancel") command(alias, "v1/models/eject", { model: alias });
  else if (what === "Reset") command(alias, `v1/models/${quoted(alias)}/reset`, {});
}

/** Waits for the answer only until the model's state changes: what is left to tell, the row tells. */
async function command(alias, path, body) {
  for (const waiting of known.pending.values()) waiting.abort(); // one connection for all that wait for room
  const wait = new AbortController();
  known.pending.set(alias, wait);
  changed();
  try {
    await send(path, body, { signal: wait.signal });
    known.models.set(alias, { ...(await get(`v1/models/${quoted(alias)}/status`)), seenAt: performance.now() });
  } catch (error) {
    if (error.name !== "AbortError") tell(`${alias}: ${error.message}`);
  }
  if (known.pending.get(alias) === wait) known.pending.delete(alias);
  changed();
}
