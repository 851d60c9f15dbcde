// Which models there are for what.

import { canChat } from "../known.js";

export const can = (card, what) =>
  what === "completion" ? canChat(card) : Boolean(card.capabilities?.includes(what));

export const cardOf = ({ allCards }, name) => allCards.find(({ id }) => id === name);

/** Of a name that is an alias, queue and slots are its model's. */
export const usedBy = (known, name) => cardOf(known, name)?.uses ?? name;

/** As far as is known. */
export function sees(known, name) {
  const card = cardOf(known, name);
  return !card?.capabilities || card.capabilities.includes("vision");
}

/** Offers the models that can do something in a select; a chosen one stays, and is said to be gone if it is. */
export function offer(select, { allCards }, what, chosen = select.value) {
  const names = allCards.filter((card) => can(card, what)).map(({ id }) => id);
  const isGone = chosen && !names.includes(chosen);
  const offered = isGone ? [chosen, ...names] : names;
  if (offered.join("\n") !== [...select.options].map(({ value }) => value).join("\n")) {
    select.replaceChildren(...offered.map((name) => new Option(name, name)));
  }
  if (chosen && select.value !== chosen) select.value = chosen;
}
