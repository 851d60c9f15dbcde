// The columns of the list: what each shows of a request, and what it is sorted by.

import { duration, number } from "../drawing.js";
import { lasted, outcomeOf } from "./known.js";

const count = (value) => (value === null ? "" : number(value));
const time = (at) => new Date(at).toLocaleTimeString("en-GB");
const seconds = (value) => (value === null ? "" : duration(value));

export const COLUMNS = [
  { name: "arrived", label: "Arrived", sortedBy: (request) => request.arrived_at, text: (request) => time(request.arrived_at) },
  { name: "id", label: "Request", sortedBy: (request) => request.id },
  { name: "outcome", label: "Outcome", sortedBy: outcomeOf },
  { name: "model", label: "Model", sortedBy: (request) => request.model, text: (request) => request.model ?? "" },
  {
    name: "client",
    label: "Client",
    title: "The name of its key, or else the address that it came from",
    sortedBy: (request) => request.client ?? request.peer,
    text: (request) => request.client ?? request.peer ?? "",
  },
  { name: "route", label: "Route", sortedBy: (request) => request.route, text: (request) => request.route },
  {
    name: "priority",
    label: "Priority",
    sortedBy: (request) => ["high", "normal", "low"].indexOf(request.priority),
    text: (request) => request.priority ?? "",
  },
  {
    name: "waited",
    label: "Waited",
    title: "For a slot, with the loading of the model",
    sortedBy: (request) => request.waited_sec,
    text: (request) => seconds(request.state === "queued" ? lasted(request) : request.waited_sec),
    isFigure: true,
  },
  {
    name: "first",
    label: "First token",
    title: "From its arrival to the first byte of the answer",
    sortedBy: (request) => request.ttft_sec,
    text: (request) => seconds(request.ttft_sec),
    isFigure: true,
  },
  { name: "total", label: "Total", sortedBy: lasted, text: (request) => seconds(lasted(request)), isFigure: true },
  {
    name: "in",
    label: "In",
    title: "Tokens of the prompt",
    sortedBy: (request) => request.prompt_tokens,
    text: (request) => count(request.prompt_tokens),
    isFigure: true,
  },
  {
    name: "cached",
    label: "Cached",
    title: "Tokens of the prompt that the engine had computed before",
    sortedBy: (request) => request.cached_tokens,
    text: (request) => count(request.cached_tokens),
    isFigure: true,
  },
  {
    name: "out",
    label: "Out",
    title: "Tokens of the answer",
    sortedBy: (request) => request.output_tokens,
    text: (request) => count(request.output_tokens),
    isFigure: true,
  },
  { name: "engine", label: "Engine", sortedBy: (request) => request.engine, text: (request) => request.engine ?? "" },
];

/** Sorts by a column, which may be named with a `-` before it: largest first. What is not known comes last. */
export function sorted(requests, by) {
  const column = COLUMNS.find(({ name }) => name === by.replace(/^-/, ""));
  if (!column) return requests;
  const sign = by.startsWith("-") ? -1 : 1;
  const keyed = requests.map((request) => [column.sortedBy(request) ?? null, request]);
  keyed.sort(([one], [other]) => {
    if (one === null || other === null) return (one === null) - (other === null);
    return sign * (typeof one === "string" ? (one < other ? -1 : one > other ? 1 : 0) : one - other);
  });
  return keyed.map(([, request]) => request);
}
