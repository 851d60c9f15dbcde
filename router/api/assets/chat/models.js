// Which models there are for what.

import { canChat } from "../known.js";

export const can = (card, what) =>
  what === "completion" ? canChat(card) : Boolean(card.capabilities?.includes(what));

const cardOf = ({ allCards }, name) => allCards.find(({ id }) => id === name);

/** Of a name that is an alias, queue and slots are its model's. */
export const usedBy = (known, name) => cardOf(known, name)?.uses ?? name;

/** As far as is known. */
export function sees(known, name) {
  const card = cardOf(known, name);
  return !card?.capabilities || card.capabilities.includes("vision");
}

const offered = new WeakMap(); // by select: what it was filled for

/** Offers the models that can do something in a select. The chosen one is offered in any case, and stays. */
export function offer(select, { allCards }, what, chosen = select.value) {
  const before = offered.get(select);
  if (before?.allCards === allCards && before.chosen === chosen) return;
  const names = allCards.filter((card) => can(card, what)).map(({ id }) => id);
  const all = chosen && !names.includes(chosen) ? [chosen, ...names] : names;
  select.replaceChildren(...all.map((name) => new Option(name, name)));
  if (chosen) select.value = chosen;
  offered.set(select, { allCards, chosen: select.value });
}
