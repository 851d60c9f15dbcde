// The chat.

import { element } from "../drawing.js";
import { canChat, known } from "../known.js";
import { noteQueue, startChat } from "./chat.js";

let wanted = "";
let offered = null;

export const view = {
  name: "chat",
  title: "Chat",
  start() {
    startChat();
  },
  show(path, query) {
    wanted = query.get("model") ?? "";
    choose();
    element("chat-text").focus();
  },
  draw() {
    if (known.queue) noteQueue(known.queue);
    if (offered === known.allCards) return;
    offered = known.allCards;
    const select = element("chat-model");
    const chosen = select.value;
    const options = offered.filter(canChat).map(({ id, uses }) => {
      const option = new Option(id, id);
      option.dataset.uses = uses ?? id;
      return option;
    });
    select.replaceChildren(...options);
    if (options.some(({ value }) => value === chosen)) select.value = chosen;
    choose();
  },
};

/** The model of the address, once it is offered. */
function choose() {
  const select = element("chat-model");
  if (![...select.options].some(({ value }) => value === wanted)) return;
  select.value = wanted;
  wanted = "";
}
