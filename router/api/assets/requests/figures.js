// Figures of all requests of the last minutes.

import { counted, duration, list, number, perSec, plain, put, putCells } from "../drawing.js";

/** Draws into the body of a table, and the sum since the start into `total`. */
export function figuresIn(body, total) {
  const showFigures = list(
    body,
    plain("tr"),
    ([name]) => name,
    ({ root }, texts) => putCells(root, texts),
  );
  return ({ telemetry }) => {
    if (!telemetry) return;
    showFigures(rowsOf(telemetry));
    const turnedAway = counted(telemetry.turned_away).replaceAll("_", " ");
    const served = `${number(telemetry.successful)} of ${number(telemetry.total_requests)} served since the start`;
    put(total, turnedAway ? `${served}; turned away: ${turnedAway}` : served);
  };
}

function rowsOf(telemetry) {
  const windows = [telemetry.windows["1m"], telemetry.windows["5m"]];
  const outcomes = [...new Set(windows.flatMap((window) => Object.keys(window.outcomes)))].sort(
    (one, other) => (other === "served") - (one === "served") || one.localeCompare(other),
  );
  const seconds = [60, 300];
  const times = (name) =>
    windows.map(({ [name]: { p50, p95 } }) => (p50 === null ? "–" : `${duration(p50)} / ${duration(p95)}`));
  return [
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
  ];
}
