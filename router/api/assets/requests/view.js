// What was asked, and how it went.

import { element } from "../drawing.js";
import { figuresIn } from "./figures.js";

let drawFigures;

export const view = {
  name: "requests",
  title: "Requests",
  start() {
    drawFigures = figuresIn(element("all-figure-rows"), element("all-since-start"));
  },
  draw(known) {
    drawFigures(known);
  },
};
