// Logs of models' engines, as they are written.

import { element } from "../drawing.js";
import { known } from "../known.js";
import { follow, quoted } from "../router.js";
import { addressOf } from "../routes.js";

const LINES = 500;

let endLog = () => {};
let read = "";

export const view = {
  name: "logs",
  title: "Logs",
  start() {
    element("log-model").addEventListener("change", ({ target }) => {
      location.hash = addressOf(target.value, "logs");
    });
  },
  show(path) {
    read = path.join("/");
    readLog(read);
    return read && `Log of ${read}`;
  },
  hide() {
    endLog();
  },
  draw() {
    const select = element("log-model");
    const aliases = ["", ...known.models.keys()];
    if (select.length !== aliases.length || aliases.some((alias, index) => select[index].value !== alias)) {
      select.replaceChildren(...aliases.map((alias) => new Option(alias || "none", alias)));
    }
    if (document.activeElement !== select) select.value = read;
  },
};

function readLog(alias) {
  const lines = element("log-lines");
  endLog();
  lines.replaceChildren();
  lines.hidden = !alias;
  if (!alias) return;
  let news = [];
  const add = () => {
    const atEnd = lines.scrollHeight - lines.scrollTop - lines.clientHeight < 40;
    for (const text of news) lines.appendChild(document.createElement("div")).textContent = text;
    while (lines.childElementCount > LINES) lines.firstElementChild.remove();
    if (atEnd) lines.scrollTop = lines.scrollHeight;
    news = [];
  };
  const note = ({ data }) => {
    if (news.push(data) === 1) requestAnimationFrame(add);
  };
  const begin = () => lines.replaceChildren();
  const refused = ({ message }) => note({ data: message });
  endLog = follow(`v1/logs/${quoted(alias)}/stream?lines=${LINES}`, note, { begin, refused });
}
