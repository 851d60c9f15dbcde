// Models that do something else than chat are tried in tabs, where there are any.

import { put, show } from "../drawing.js";
import { known } from "../known.js";
import { tell } from "../notice.js";
import { address } from "../routes.js";
import { make } from "./making.js";
import { can } from "./models.js";

const TABS = { embeddings: "embedding", rerank: "rerank", transcription: "transcription" };

/** The tabs of the view: `open` shows one, or the chat if there is none of that name, and returns which it was. */
export function tabsOf({ tabs, frame, other }) {
  const made = new Map(); // by name
  let shown = "";

  function open(name) {
    shown = name in TABS ? name : "";
    show(frame, !shown);
    show(other, shown !== "");
    if (made.has(shown)) other.replaceChildren(made.get(shown).root);
    else if (shown) load(shown);
    draw();
    return shown !== "";
  }

  async function load(name) {
    try {
      const module = await import(`./${name}.js`);
      if (!made.has(name)) made.set(name, module.tab(known));
      if (shown === name) open(name);
    } catch (error) {
      tell(`This view cannot be loaded: ${error.message}`);
    }
  }

  function draw() {
    const isThere = (name) => name === shown || known.allCards.some((card) => can(card, TABS[name]));
    const there = Object.keys(TABS).filter(isThere);
    const offered = there.length ? ["", ...there] : [];
    if (offered.join() !== [...tabs.children].map(({ dataset }) => dataset.tab).join()) {
      tabs.replaceChildren(...offered.map(link));
    }
    for (const each of tabs.children) put(each, each.dataset.tab === shown ? "page" : null, "ariaCurrent");
    put(other, shown ? `Try ${shown}` : null, "ariaLabel");
    show(tabs, offered.length > 0);
    made.get(shown)?.draw();
  }

  return { open, draw };
}

function link(name) {
  const words = name ? name[0].toUpperCase() + name.slice(1) : "Chat";
  return make("a", { href: address("chat", name ? [name] : []), "data-tab": name }, words);
}
