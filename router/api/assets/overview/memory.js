// Memory by device: whose it is.

import { element, list, lists, plain, put, size, stamp } from "../drawing.js";

const colours = new Map();
const colour = (alias) => {
  if (!colours.has(alias)) colours.set(alias, colours.size % 6);
  return `colour-${colours.get(alias)}`;
};

const showDevices = list(
  element("devices"),
  () => stamp("device-row"),
  (device) => device.name,
  fillDevice,
);
const showBar = lists(
  plain("span"),
  (part) => part.key,
  (segment, part) => {
    put(segment.root, part.look, "className");
    put(segment.root, `${part.name} ${size(part.mib)}`, "title");
    put(segment.root.style, String(part.mib), "flexGrow");
  },
);
const showLegend = lists(
  plain("li"),
  (part) => part.key,
  (entry, part) => {
    put(entry.root, part.look, "className");
    put(entry.root, `${part.name} ${size(part.mib)}`);
  },
);

export function drawMemory({ vram }) {
  if (vram) showDevices(vram.devices.map((device) => ({ ...device, models: vram.models })));
}

function fillDevice(row, device) {
  const { name } = device;
  const models = device.models
    .filter((model) => model.booked_mb[name])
    .map((model) => ({
      key: `model ${model.model_alias}`,
      name: model.status === "loading" ? `${model.model_alias} (reserved)` : model.model_alias,
      mib: model.booked_mb[name],
      look: `${colour(model.model_alias)} ${model.status === "loading" ? "reserved" : ""}`,
    }));
  const rest = [
    { key: "external", name: "others", mib: device.external_mb, look: "external" },
    { key: "free", name: "free for models", mib: device.free_for_new_model_mb, look: "free" },
    { key: "kept", name: "kept free", mib: device.reserve_mb, look: "kept" },
  ];
  const parts = [...models, ...rest].filter((part) => part.mib > 0);
  put(row.name, name);
  put(row.label, device.label ?? "");
  const figures = [
    `${size(device.booked_mb)} models of ${size(device.total_mb)}`,
    device.utilization !== null && `${Math.round(100 * device.utilization)} % busy`,
    device.temperature_c !== null && `${Math.round(device.temperature_c)} °C`,
    device.power_w !== null && `${Math.round(device.power_w)} W`,
  ];
  put(row.figures, figures.filter(Boolean).join(" · "));
  showBar(row.bar, parts);
  put(row.bar, `${name}: ${parts.map((part) => `${part.name} ${size(part.mib)}`).join(", ")}`, "ariaLabel");
  showLegend(row.legend, parts);
}

