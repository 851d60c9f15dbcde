// What the router remembers of the last minutes, and how the page keeps up with it: asked for once, and then only for
// what is new.

import { get } from "../router.js";

const LEAST_SEC = 120; // that is shown, also if the router has just been started
const ASKED_MS = 10_000; // a step of the router; changes of states are asked for at once

export const past = {
  from: 0, // seconds since the epoch, by the router's clock, as all times here
  to: 0,
  step: 10,
  lanes: new Map(), // by alias: { spans: [{ state, from, to, reason }], in_flight: [[time, number]], queued }
  points: [], // { at, tokens, wait, memory: { device: MiB } }, oldest first
  devices: new Map(), // by name: MiB in all
  version: 0,
};

let askedAt = -Infinity;
let decided;

/** Asks for what is new, unless it was asked a moment ago and nothing has been decided since. */
export async function keepUp({ decisions }) {
  const newest = decisions[0]?.key;
  if (performance.now() - askedAt < ASKED_MS && newest === decided) return;
  const told = await get(`v1/timeline${past.to ? `?since=${past.to}` : ""}`);
  [askedAt, decided] = [performance.now(), newest];
  note(told);
}

/** Adds what was told to what is known. */
export function note({ from, to, whole, models, series }) {
  if (whole) {
    past.lanes.clear();
    past.points = [];
  }
  [past.from, past.to, past.step] = [Math.min(from, to - LEAST_SEC), to, series.step_sec];
  for (const [alias, news] of Object.entries(models)) {
    const lane = past.lanes.get(alias) ?? { spans: [], in_flight: [], queued: [] };
    past.lanes.set(alias, {
      spans: merged(lane.spans, news.spans, (span) => span.from),
      in_flight: merged(lane.in_flight, news.in_flight, ([time]) => time),
      queued: merged(lane.queued, news.queued, ([time]) => time),
    });
  }
  const points = series.at.map((at, index) => ({
    at,
    tokens: series.tokens_per_sec[index],
    wait: series.wait_p95_sec[index],
    memory: Object.fromEntries(
      Object.entries(series.devices).map(([name, device]) => [name, device.used_mib[index]]),
    ),
  }));
  past.points = merged(past.points, points, (point) => point.at).filter(({ at }) => at + past.step > from);
  for (const [name, device] of Object.entries(series.devices)) past.devices.set(name, device.total_mib);
  for (const [alias, lane] of past.lanes) {
    lane.spans = lane.spans.filter((span) => span.to === null || span.to > from);
    lane.in_flight = since(lane.in_flight, from);
    lane.queued = since(lane.queued, from);
    if (!didSomething(lane, from)) past.lanes.delete(alias);
  }
  past.version += 1;
}

/** Both in order; what is new replaces what was known of the same time. */
function merged(before, news, timeOf) {
  if (!news.length) return before;
  const byTime = new Map([...before, ...news].map((each) => [timeOf(each), each]));
  return [...byTime.values()].sort((one, other) => timeOf(one) - timeOf(other));
}

/** Numbers from a time on, with what held then. */
const since = (numbers, from) => numbers.filter((_, index) => (numbers[index + 1]?.[0] ?? Infinity) > from);

const didSomething = ({ spans, in_flight, queued }, from) =>
  spans.some((span) => span.state !== "off" || span.from > from) ||
  [in_flight, queued].some((numbers) => numbers.some(([, number]) => number));

/** The largest number that held between two times. */
export const most = (numbers, from, to) =>
  Math.max(
    0,
    ...numbers.filter(([at], index) => at < to && (numbers[index + 1]?.[0] ?? Infinity) > from).map(([, n]) => n),
  );

/** The time of day, where the browser is. */
export const clock = (seconds) => new Date(1000 * seconds).toLocaleTimeString("en-GB");
