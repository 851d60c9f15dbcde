// Talking to the router: requests with the key, and streams of events, followed while somebody sees the page.

const KEY = "llama-router key";
const SILENCE_MS = 45_000; // the router says something every 30 s
const RETRY_MS = 2_000;

/** An answer that is an error. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Since when the router does not answer, on the clock of `performance.now()`; 0 while it does. */
export let lostSince = 0;

export const hasKey = () => sessionStorage.getItem(KEY) !== null;
export const setKey = (key) => sessionStorage.setItem(KEY, key);
export const forgetKey = () => sessionStorage.removeItem(KEY);

/** The headers of a request with this key, or with the tab's. */
export const authorization = (key = sessionStorage.getItem(KEY)) =>
  key === null ? {} : { authorization: `Bearer ${key}` };

let askForKey = async (reason) => {
  throw new Refused(401, reason);
};
let asking;

/** `ask` is called with a reason when the router wants another key, and resolves once one was set. */
export function whenLocked(ask) {
  askForKey = ask;
}

/** The router's answer. Waits for a key where one is needed. Throws Refused, and what `fetch` throws. */
export async function ask(path, { headers = {}, ...more } = {}) {
  for (;;) {
    const used = sessionStorage.getItem(KEY);
    let answer;
    try {
      answer = await fetch(path, { ...more, headers: { ...headers, ...authorization(used) }, cache: "no-store" });
    } catch (error) {
      if (error.name !== "AbortError") lostSince ||= performance.now();
      throw error;
    }
    lostSince = 0;
    if (answer.ok) return answer;
    const refused = await answer.json().catch(() => ({}));
    const message = refused.error?.message ?? `The router answered ${answer.status}.`;
    if (answer.status !== 401) throw new Refused(answer.status, message);
    if (used !== sessionStorage.getItem(KEY)) continue; // somebody else has got a new one meanwhile
    asking ??= askForKey(used === null ? "" : message).finally(() => (asking = undefined));
    await asking;
  }
}

/** For what the page shows: given up once nobody sees it. */
export const get = async (path) => (await ask(path, { signal: sight.signal })).json();

export const send = (path, body, more = {}) =>
  ask(path, {
    method: "POST",
    body: JSON.stringify(body),
    ...more,
    headers: { "content-type": "application/json", ...more.headers },
  });

/** An alias within a path. */
export const quoted = (alias) => alias.split("/").map(encodeURIComponent).join("/");

/** Server-sent events of an answer as they come, `{event, id, data}`; and its comments, `{comment}`. */
export async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let event = {};
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const whole of lines) {
        const line = whole.replace(/\r$/, "");
        const colon = line.indexOf(":");
        const name = colon < 0 ? line : line.slice(0, colon);
        const said = line.slice(name.length + 1).replace(/^ /, "");
        if (line === "") {
          if ("data" in event) yield event;
          event = {};
        } else if (name === "") yield { comment: said };
        else if (name === "data") event.data = "data" in event ? `${event.data}\n${said}` : said;
        else if (name === "event" || name === "id") event[name] = said;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

let sight = new AbortController(); // aborted while the page is hidden

document.addEventListener("visibilitychange", () => {
  if (document.hidden) sight.abort();
  else sight = new AbortController();
});

/** Resolves when the page is seen. */
export const seen = () =>
  document.hidden
    ? new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }))
    : Promise.resolve();

export const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/**
 * Gives the events of a stream to `note`, and takes it up again where it ended, whenever it does. A hidden page
 * follows nothing. `begin` is called before the first event of each connection; without `refused`, a stream is tried
 * again also where it is refused. Returns what ends it.
 */
export function follow(path, note, { begin = () => {}, refused } = {}) {
  const end = new AbortController();
  run();
  return () => end.abort();

  async function run() {
    let last = "";
    while (!end.signal.aborted) {
      await seen();
      const silent = new AbortController();
      const stop = () => silent.abort();
      let silence = setTimeout(stop, SILENCE_MS);
      try {
        const headers = { accept: "text/event-stream", ...(last && { "last-event-id": last }) };
        const answer = await ask(path, {
          headers,
          signal: AbortSignal.any([end.signal, sight.signal, silent.signal]),
        });
        begin();
        for await (const event of eventsOf(answer)) {
          clearTimeout(silence);
          silence = setTimeout(stop, SILENCE_MS);
          if (event.comment !== undefined) continue;
          last = event.id ?? last;
          note(event);
        }
      } catch (error) {
        if (refused && error instanceof Refused && error.status < 500) return refused(error);
      } finally {
        clearTimeout(silence);
      }
      if (!document.hidden) await pause(RETRY_MS);
    }
  }
}
