// Logs of models' engines, as they are written.

import { copy, element, matches, number, put, show } from "../drawing.js";
import { known } from "../known.js";
import { follow, quoted } from "../router.js";
import { addressOf, keepQuery, parsed } from "../routes.js";

const LINES = 1000;

let endLog = () => {};
let read = "";
let paused = false;
let arrived = 0; // lines that came while it was paused
let missed = 0;

export const view = {
  name: "logs",
  title: "Logs",
  start() {
    const select = element("log-model");
    select.addEventListener("change", () => {
      location.hash = addressOf(select.value, "logs");
    });
    element("log-filter").addEventListener("input", () => {
      keep();
      filter(element("log-lines").children);
    });
    element("log-pause").addEventListener("click", () => {
      paused = !paused;
      arrived = 0;
      put(element("log-pause"), String(paused), "ariaPressed");
      if (!paused) showNews();
      drawNote();
    });
    element("log-wrap").addEventListener("click", ({ target }) => {
      put(target, String(target.ariaPressed !== "true"), "ariaPressed");
      keep();
      wrap();
    });
    element("log-copy").addEventListener("click", ({ target }) => {
      const lines = [...element("log-lines").children].filter((line) => !line.hidden);
      copy(lines.map((line) => `${line.textContent}\n`).join(""), target);
    });
  },
  show(path, query) {
    put(element("log-filter"), query.get("q") ?? "", "value");
    put(element("log-wrap"), query.get("wrap") === "no" ? "false" : "true", "ariaPressed");
    wrap();
    read = path.join("/");
    readLog(read);
    return read ? `Log of ${read}` : "Logs";
  },
  hide() {
    endLog();
  },
  draw() {
    const select = element("log-model");
    const aliases = [...known.models.keys()];
    if (!aliases.includes(read)) aliases.unshift(read); // of one of its engines, of none, or of a model that is gone
    if (select.length !== aliases.length || aliases.some((alias, index) => select[index].value !== alias)) {
      select.replaceChildren(...aliases.map((alias) => new Option(alias || "Choose a model", alias)));
    }
    if (document.activeElement !== select) select.value = read;
    show(element("log-lines"), read && known.manages);
    drawNote();
  },
};

const keep = () =>
  keepQuery({
    ...Object.fromEntries(parsed().query),
    q: element("log-filter").value,
    wrap: element("log-wrap").ariaPressed === "false" ? "no" : "",
  });

const wrap = () => put(element("log-lines").dataset, element("log-wrap").ariaPressed, "wrap");

function filter(lines) {
  const wanted = element("log-filter").value.trim();
  for (const line of lines) put(line, Boolean(wanted) && !matches(wanted, [line.textContent]), "hidden");
  drawNote();
}

function drawNote() {
  const lines = [...element("log-lines").children];
  const shown = lines.filter((line) => !line.hidden).length;
  put(
    element("log-note"),
    !known.manages
      ? "Logs need a key with full access."
      : !read
        ? "The router keeps the last lines that each model's engines have written, also of those that have exited."
        : [
            lines.length === 0 && "Nothing has been written yet.",
            shown < lines.length && `${number(shown)} of ${number(lines.length)} lines`,
            paused && `paused, ${number(arrived)} new lines`,
            missed && `${number(missed)} lines came too fast to be shown`,
          ]
            .filter(Boolean)
            .join(" · "),
  );
}

let news = [];
let showNews = () => {};

function readLog(alias) {
  const lines = element("log-lines");
  endLog();
  lines.replaceChildren();
  [news, missed, arrived] = [[], 0, 0];
  if (!alias) return;
  let due = false;
  showNews = () => {
    due = false;
    if (paused) return;
    const atEnd = lines.scrollHeight - lines.scrollTop - lines.clientHeight < 40;
    const added = news.splice(0).slice(-LINES).map((text) => {
      const line = document.createElement("div");
      line.textContent = text;
      return line;
    });
    filter(added);
    lines.append(...added);
    while (lines.childElementCount > LINES) lines.firstElementChild.remove();
    if (atEnd) lines.scrollTop = lines.scrollHeight;
    drawNote();
  };
  const note = ({ event, data }) => {
    if (event === "missed") {
      missed += Number(data);
      return;
    }
    news.push(data);
    if (news.length > 2 * LINES) news = news.slice(-LINES);
    if (paused) arrived += 1;
    if (due) return;
    due = true;
    requestAnimationFrame(showNews);
  };
  const begin = () => {
    news = [];
    if (!paused) lines.replaceChildren();
  };
  const refused = ({ message }) => note({ data: message });
  endLog = follow(`v1/logs/${quoted(alias)}/stream?lines=${LINES}`, note, { begin, refused });
}
