// Small charts of the last minutes: tokens, waits, and memory by device.

import { duration, element, list, put, size } from "../drawing.js";
import { explore } from "./explore.js";
import { clock, past } from "./past.js";
import { area, mark, picture, set, shape, share } from "./pictures.js";

const rate = (tokens) => `${tokens.toFixed(tokens < 10 ? 1 : 0)} tokens/s`;
const FEWEST = { tokens: 10, wait: 1 };

const showCharts = list(
  element("charts"),
  makeChart,
  (chart) => chart.name,
  fillChart,
);

export function drawCharts() {
  const { points } = past;
  const of = (key) => points.map((point) => [point.at, point[key]]);
  const devices = [...past.devices].map(([device, total]) => ({
    name: `Memory of ${device}`,
    look: "memory",
    numbers: points.map((point) => [point.at, point.memory[device] ?? null]),
    scale: total,
    text: size,
    bound: `of ${size(total)}`,
  }));
  showCharts([
    { name: "Tokens", look: "tokens", numbers: of("tokens"), fewest: FEWEST.tokens, text: rate },
    { name: "Waits, p95", look: "waits", numbers: of("wait"), fewest: FEWEST.wait, text: duration },
    ...devices,
  ]);
}

function makeChart({ name, look }) {
  const root = document.createElement("figure");
  const caption = root.appendChild(document.createElement("figcaption"));
  const title = caption.appendChild(document.createElement("span"));
  title.textContent = name;
  const figure = caption.appendChild(document.createElement("span"));
  figure.className = "dim";
  const track = root.appendChild(document.createElement("div"));
  track.className = "track";
  track.tabIndex = 0;
  track.role = "slider";
  track.ariaLabel = `${name} in the last minutes`;
  const svg = track.appendChild(picture());
  const drawn = svg.appendChild(shape("path", look));
  const cursor = svg.appendChild(shape("rect", "cursor"));
  return { root, figure, track, drawn, cursor };
}

function fillChart({ figure, track, drawn, cursor }, { numbers, scale, fewest, text, bound }) {
  const known = numbers.filter(([, number]) => number !== null);
  const highest = Math.max(0, ...known.map(([, number]) => number));
  set(drawn, {
    d: area(
      known.map(([at, number]) => [at, number, at + past.step]),
      scale ?? Math.max(fewest, highest),
    ),
  });
  const last = numbers.at(-1)?.[1] ?? null;
  const now = last === null ? "–" : text(last);
  const rest = `${now} ${bound ?? `· most ${text(highest)}`}`;
  const chosen = explore(
    track,
    known.map(([at, number]) => ({
      key: at,
      from: share(at),
      to: share(at + past.step),
      text: `${clock(at)}: ${text(number)}`,
    })),
    (item) => {
      mark(cursor, item);
      put(figure, item?.text ?? rest);
    },
  );
  if (!chosen) put(figure, rest);
}
