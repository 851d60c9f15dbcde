// Pulls of models from the hub.

import { bytes, duration, element, list, put, show, stamp } from "../drawing.js";
import { changed, isRunning, known } from "../known.js";
import { tell } from "../notice.js";
import { ask, get, send } from "../router.js";

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
    show(row.cancel, running);
    show(row.progress, running);
    row.progress.value = pull.total_bytes ? pull.completed_bytes / pull.total_bytes : 0;
  },
);

export function drawPulls({ pulls, manages }) {
  show(element("pulls"), manages);
  showPulls([...pulls].reverse().slice(0, 5));
}

export function startPulls() {
  element("pull-form").addEventListener("submit", (event) => {
    event.preventDefault();
    change(async () => {
      await send("v1/models/pull", { model: element("pull-model").value.trim() });
      element("pull-form").reset();
    });
  });
  element("pull-rows").addEventListener("click", ({ target }) => {
    const button = target.closest("button");
    if (!button) return;
    const { pull } = button.closest("li").dataset;
    change(() => ask(`v1/models/pull/${pull}`, { method: "DELETE" }));
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
