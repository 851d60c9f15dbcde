// Requests as a file.

const FIELDS = [
  ...["id", "state", "outcome", "status", "model", "client", "peer", "route", "priority", "arrived_at", "ended_at"],
  ...["waited_sec", "load_sec", "ttft_sec", "total_sec", "prompt_tokens", "cached_tokens", "output_tokens", "kv"],
  ...["engine", "streamed", "request_bytes", "answer_bytes", "retries", "reason"],
];

export function asJson(requests) {
  const told = requests.map(({ key, words, ...request }) => request);
  return JSON.stringify(told, null, 1);
}

export const asCsv = (requests) =>
  [FIELDS, ...requests.map((request) => FIELDS.map((field) => request[field]))]
    .map((row) => `${row.map(cell).join(",")}\r\n`)
    .join("");

/** A text that a spreadsheet would take for a formula (an id may be any client's) is marked as a text. */
function cell(value) {
  if (typeof value !== "string") return String(value ?? "");
  const text = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

export function save(name, kind, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: kind }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
