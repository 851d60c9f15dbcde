// The last minutes: what models did, and how much was asked of them.

import { element, show } from "../drawing.js";
import { drawCharts } from "./charts.js";
import { drawLanes, startLanes } from "./lanes.js";
import { keepUp, past } from "./past.js";

let drawn = 0;

export const startTimeline = startLanes;
export const askTimeline = keepUp;

/** Draws what is new: nothing of it moves in between. */
export function drawTimeline(known) {
  if (drawn === past.version) return;
  drawn = past.version;
  show(element("timeline"), past.lanes.size || past.points.length);
  drawLanes(known);
  drawCharts();
}
