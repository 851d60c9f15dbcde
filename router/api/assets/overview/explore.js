// A picture along the time axis that tells its parts one by one: to the pointer, and to the arrow keys as a slider.

import { put } from "../drawing.js";

const kept = new WeakMap(); // by picture: { items, chosen, tell }

const STEPS = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 };

/**
 * Sets the parts of a picture, in order: `{ from, to, text }`, times as shares of its width. `tell` is called with the
 * part that is looked at, or null; it is returned, too.
 */
export function explore(picture, items, tell) {
  if (!kept.has(picture)) {
    kept.set(picture, { items, chosen: null, tell });
    listenTo(picture);
  }
  const state = kept.get(picture);
  state.items = items;
  state.tell = tell;
  if (state.chosen) {
    state.chosen = items.find((item) => item.key === state.chosen.key) ?? null;
    tell(state.chosen);
  }
  say(picture, state);
  return state.chosen;
}

function listenTo(picture) {
  const state = kept.get(picture);
  const choose = (item) => {
    if (item === state.chosen) return;
    state.chosen = item ?? null;
    state.tell(state.chosen);
    say(picture, state);
  };
  const point = ({ clientX }) => {
    const { left, width } = picture.getBoundingClientRect();
    const share = (clientX - left) / width;
    choose(state.items.findLast((item) => item.from <= share && share <= item.to));
  };
  picture.addEventListener("pointermove", point);
  picture.addEventListener("pointerdown", point);
  picture.addEventListener("pointerleave", () => {
    if (picture !== document.activeElement) choose(null);
  });
  picture.addEventListener("focus", () => choose(state.chosen ?? state.items.at(-1)));
  picture.addEventListener("blur", () => choose(null));
  picture.addEventListener("keydown", (event) => {
    const { key } = event;
    const last = state.items.length - 1;
    const at = state.chosen ? state.items.indexOf(state.chosen) : last;
    const next = key === "Home" ? 0 : key === "End" ? last : key in STEPS ? at + STEPS[key] : null;
    if (next === null) return;
    event.preventDefault();
    choose(state.items[Math.max(0, Math.min(last, next))]);
  });
}

function say(picture, { items, chosen }) {
  const shown = chosen ?? items.at(-1);
  put(picture, "0", "ariaValueMin");
  put(picture, String(Math.max(0, items.length - 1)), "ariaValueMax");
  put(picture, String(Math.max(0, items.indexOf(shown))), "ariaValueNow");
  put(picture, shown?.text ?? "nothing yet", "ariaValueText");
}
