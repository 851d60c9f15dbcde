// Pictures over the last minutes, as SVG: one unit wide per thousandth of the time shown.

import { past } from "./past.js";

const WIDTH = 1000;
export const HEIGHT = 100;

const SVG = "http://www.w3.org/2000/svg";

/** A new element of a picture. */
export function shape(name, look = "") {
  const node = document.createElementNS(SVG, name);
  if (look) node.setAttribute("class", look);
  return node;
}

/** Sets attributes. What stays the same costs nothing. */
export function set(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    const text = String(value);
    if (node.getAttribute(name) !== text) node.setAttribute(name, text);
  }
}

/** An empty picture that fills its parent, with lines at its thirds. */
export function picture() {
  const svg = shape("svg");
  set(svg, { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  const lines = shape("path", "grid");
  set(lines, { d: `M${WIDTH / 3} 0V${HEIGHT}M${(2 * WIDTH) / 3} 0V${HEIGHT}` });
  svg.append(lines);
  return svg;
}

/** Where a time is, from 0 to 1. */
export const share = (time) =>
  Math.max(0, Math.min(1, (time - past.from) / Math.max(1, past.to - past.from)));

const x = (time) => (WIDTH * share(time)).toFixed(1);

/** Marks the time between two shares of the width; of null, none. */
export function mark(node, item) {
  const from = item?.from ?? 0;
  set(node, { x: WIDTH * from, y: 0, width: item ? Math.max(2, WIDTH * (item.to - from)) : 0, height: HEIGHT });
}

export const place = (from, to) => {
  const begin = WIDTH * share(from);
  return { x: begin.toFixed(1), width: Math.max(1.2, WIDTH * share(to) - begin).toFixed(1) };
};

/**
 * The outline of numbers that each hold from a time to the next, `[time, number, until]`; `scale` is the largest.
 * `hangs`: from the top down.
 */
export function area(numbers, scale, { hangs = false } = {}) {
  const base = hangs ? 0 : HEIGHT;
  const y = (number) => {
    const height = number > 0 ? Math.max(4, HEIGHT * Math.min(1, number / scale)) : 0;
    return (hangs ? height : HEIGHT - height).toFixed(1);
  };
  return numbers
    .filter(([, number]) => number > 0)
    .map(([from, number, until]) => `M${x(from)} ${base}V${y(number)}H${x(until)}V${base}Z`)
    .join("");
}

/** Numbers with the time until which each holds. */
export const lasting = (numbers) =>
  numbers.map(([at, number], index) => [at, number, numbers[index + 1]?.[0] ?? past.to]);
