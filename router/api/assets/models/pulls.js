// Pulls of models from the hub: what one would take, before it starts; and how far it is.

import { allow, announce, bytes, duration, element, list, put, putFacts, show, size, stamp, tokens } from "../drawing.js";
import { changed, isRunning, known } from "../known.js";
import { sure, tell } from "../notice.js";
import { ask, get, send } from "../router.js";

const MOST_SHOWN = 5;

const showPulls = list(
  element("pull-rows"),
  () => stamp("pull-row"),
  (pull) => pull.id,
  (row, pull) => {
    const running = isRunning(pull);
    const rate = pull.bytes_per_sec ? `, ${bytes(pull.bytes_per_sec)}/s` : "";
    const left = pull.eta_sec ? `, ${duration(pull.eta_sec)} left` : "";
    const amount = pull.total_bytes ? ` ${bytes(pull.completed_bytes)} of ${bytes(pull.total_bytes)}` : "";
    const memory = running && pull.memory && !pull.memory.fits ? "; it will not fit into memory as it is" : "";
    row.root.dataset.pull = pull.id;
    row.root.dataset.state = pull.status;
    put(row.name, pull.alias ?? pull.reference);
    put(
      row.status,
      `${pull.status}${running ? `${amount}${rate}${left}${memory}` : ""}${pull.error ? `: ${pull.error.message}` : ""}`,
    );
    put(row.status, pull.error ? "error" : "", "className");
    show(row.cancel, running);
    put(row.cancel, `Cancel the pull of ${pull.reference}`, "ariaLabel");
    show(row.progress, running);
    put(row.progress, pull.total_bytes ? pull.completed_bytes / pull.total_bytes : 0, "value");
    put(row.progress, `How far ${pull.reference} is pulled`, "ariaLabel");
  },
);

const seen = new Map(); // the last status of each pull

export function drawPulls({ pulls, manages }) {
  show(element("pulls"), manages);
  showPulls([...pulls].reverse().slice(0, MOST_SHOWN));
  for (const { id, status, alias, reference } of pulls) {
    if (seen.has(id) && seen.get(id) !== status) announce(`pull of ${alias ?? reference}: ${status}`);
    seen.set(id, status);
  }
}

export function startPulls() {
  element("pull-form").addEventListener("submit", (event) => {
    event.preventDefault();
    estimate();
  });
  element("pull-start").addEventListener("click", pull);
  element("pull-model").addEventListener("input", () => show(element("pull-forecast"), false));
  element("pull-rows").addEventListener("click", ({ target }) => {
    const button = target.closest("button");
    if (!button) return;
    const { pull } = button.closest("li").dataset;
    change(() => ask(`v1/models/pull/${pull}`, { method: "DELETE" }));
  });
}

const wanted = () => element("pull-model").value.trim();

/** Shows what the wanted model would take. Null if that cannot be told. */
async function estimate() {
  const model = wanted();
  if (!element("pull-form").reportValidity() || !model) return null;
  const buttons = [element("pull-estimate"), element("pull-start")];
  for (const button of buttons) allow(button, false);
  say("Reading the headers of its files …");
  let told = null;
  try {
    told = await (await send("v1/models/estimate", { model })).json();
  } catch (error) {
    say(error.message, "error");
  }
  for (const button of buttons) allow(button, true);
  if (!told || model !== wanted()) return null;
  say(`${told.model} ${told.message}.`, told.fits === "never" ? "error" : "");
  const context = told.context && `${tokens(told.context)}${told.context_key ? ` (${told.context_key})` : ""}`;
  putFacts(element("forecast-facts"), [
    ["download", told.download_bytes ? bytes(told.download_bytes) : told.total_bytes ? "nothing: it is here" : ""],
    ["memory", Object.entries(told.need_mib).map((need) => ofDevice(need, told)).join("; ")],
    ["context", context],
    ["largest context", told.largest_context && tokens(told.largest_context)],
    ["engine", told.engine],
    ["source", told.source],
    ["problem", told.problem],
  ]);
  return told;
}

const ofDevice = ([device, mib], { total_mib: total, free_mib: free }) =>
  `${size(mib)} on ${device}, of ${size(total[device])}, ${size(free[device])} free for models`;

function say(words, className = "") {
  put(element("forecast-words"), words);
  put(element("forecast-words"), className, "className");
  putFacts(element("forecast-facts"), []);
  show(element("pull-forecast"), true);
}

/** Pulls the wanted model: at once if it can run here, else when that is wanted all the same. */
async function pull() {
  const model = wanted();
  const told = await estimate();
  if (!told) return;
  if (told.fits === "never" || told.problem) {
    const problem = told.problem ?? `${told.model} ${told.message}.`;
    if (!(await sure(`${problem} Pull it all the same?`, "Pull"))) return;
  }
  await change(async () => {
    await send("v1/models/pull", { model });
    element("pull-form").reset();
    show(element("pull-forecast"), false); // the pull itself tells the rest
  });
}

async function change(what) {
  try {
    await what();
    known.pulls = (await get("v1/models/pull")).pulls;
  } catch (error) {
    tell(error.message);
  }
  changed();
}
