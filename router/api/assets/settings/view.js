// The key and the look of the page; and how the router is configured.

import { duration, element, put, putFacts, show } from "../drawing.js";
import { forgetKey, get, hasKey, setKey } from "../router.js";

const THEME = "llama-router theme"; // read by theme.js

const seconds = (text) => (Number.isFinite(Number(text)) ? duration(Number(text)) : text);
const listed = (text) => JSON.parse(text).join(", ");
const WORDS = { null: "as it comes", "[]": "none", "{}": "none", true: "yes", false: "no" };

/** What matters most of the configuration: its keys, words for them, and how their values are shown. */
const SHOWN = [
  ["system.max_concurrent_models", "models at once"],
  ["system.memory_budget_mb", "memory budget, MiB"],
  ["system.vram_reserve_mb", "kept free on each device, MiB"],
  ["system.gpu_devices", "GPUs"],
  ["system.idle_timeout_sec", "idle models are unloaded after", seconds],
  ["system.keep_warm_models", "models kept warm"],
  ["system.preload_models", "loaded at the start", listed],
  ["system.queue_timeout_sec", "longest wait in the queue", seconds],
  ["system.max_queue_size_per_model", "longest queue of a model"],
  ["system.max_queue_size_total", "longest queue of all"],
  ["scheduling.max_wait_sec.normal", "a busy model gives way after", seconds],
  ["scheduling.residency_factor", "residency factor"],
  ["api.max_body_mb", "largest request, MiB"],
  ["api.max_connections", "connections at most"],
  ["api.api_keys", "full keys"],
  ["api.inference_keys", "inference keys"],
  ["system.models_dirs", "folders of models", listed],
  ["kv_store.enabled", "conversations kept on disk"],
  ["system.requests_kept", "requests kept for the list"],
  ["system.capture.requests", "bodies of requests kept"],
];

let config = null;

export const view = {
  name: "settings",
  title: "Settings",
  start() {
    element("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      setKey(element("own-key").value.trim());
      location.reload();
    });
    element("forget").addEventListener("click", () => {
      forgetKey();
      location.reload();
    });
    element("theme").addEventListener("change", ({ target: { value } }) => {
      document.documentElement.dataset.theme = value;
      if (value) localStorage.setItem(THEME, value);
      else localStorage.removeItem(THEME);
    });
  },
  show() {
    element("theme").value = localStorage.getItem(THEME) ?? "";
    config = null; // it may have been reloaded since
  },
  draw({ manages }) {
    show(element("forget"), hasKey());
    const may = manages
      ? "With this key you may do everything."
      : "With this key you may use the models; it manages nothing, and shows nothing of others.";
    put(element("may"), hasKey() ? may : "This router asks for no key: whoever reaches it may do everything.");
    show(element("metrics-link"), !hasKey()); // a link cannot bring a key
    show(element("router-config"), config);
    if (!config) return;
    const { version, values } = config;
    put(element("version"), `llama-router ${version}`);
    const chosen = SHOWN.filter(([key]) => key in values);
    putFacts(
      element("config-facts"),
      chosen.map(([key, words, told = (text) => text]) => [words, WORDS[values[key]] ?? told(values[key]), key]),
    );
    putFacts(element("config-all"), Object.entries(values));
  },
  async ask({ manages }) {
    if (manages) config ??= await get("v1/config");
  },
};
