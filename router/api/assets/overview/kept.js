// Conversations that are kept on disk.

import { bytes, duration, element, list, number, plain, put, putCells, show } from "../drawing.js";

const showKept = list(
  element("kv-rows"),
  plain("tr"),
  (row) => row.alias,
  ({ root }, { alias, count, bytes: onDisk, since_start: { restores, prefill_saved_sec: spared } }) =>
    putCells(root, [alias, number(count), bytes(onDisk), number(restores), duration(spared)]),
);

export function drawKept({ kv, manages }) {
  show(element("kv"), manages && kv?.enabled);
  if (!kv) return;
  const { total, limits, models } = kv;
  put(element("kv-counts"), `${number(total.count)}, ${bytes(total.bytes)} of ${bytes(limits.bytes)}`);
  show(element("kv-head"), Object.keys(models).length);
  showKept(Object.entries(models).map(([alias, kept]) => ({ alias, ...kept })));
}

