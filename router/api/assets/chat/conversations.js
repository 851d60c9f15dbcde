// Conversations, kept in this browser: IndexedDB, as images would not fit into anything else.
//
// A conversation is a tree of turns. Each turn is a record of its own, so that an answer that is being written can
// be kept often. Which branch is shown is in `chosen`: for each lane, the chosen child of each turn ("" for the
// first).

import { matches } from "../drawing.js";
import { identity } from "./making.js";

const BEGINNING = "";
const TITLE_LENGTH = 60;

// --- the database --------------------------------------------------------------------------------------------

let opening;

function database() {
  opening ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("llama-router chat", 1);
    request.onupgradeneeded = () => {
      const { result } = request;
      result.createObjectStore("conversations", { keyPath: "id" });
      result.createObjectStore("turns", { keyPath: "id" }).createIndex("conversation", "conversation");
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opening;
}

const settled = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

async function read(store, ask) {
  return settled(ask((await database()).transaction(store).objectStore(store)));
}

/** Turns that are being written, and would be lost with the page. */
export const unwritten = new Set();

/** Writes into both stores in one transaction. */
async function write(change, written = []) {
  for (const turn of written) unwritten.add(turn);
  try {
    const transaction = (await database()).transaction(["conversations", "turns"], "readwrite");
    change(transaction.objectStore("conversations"), transaction.objectStore("turns"));
    await new Promise((resolve, reject) => {
      transaction.oncomplete = resolve;
      transaction.onerror = transaction.onabort = () => reject(transaction.error);
    });
  } finally {
    for (const turn of written) unwritten.delete(turn);
  }
}

/** All conversations without their turns, the latest first. */
export async function listed() {
  const all = await read("conversations", (store) => store.getAll());
  return all.sort((one, other) => other.at - one.at);
}

/** A conversation with its turns; undefined if it is not there. */
export async function opened(id) {
  const about = await read("conversations", (store) => store.get(id));
  if (!about) return undefined;
  return new Conversation(about, await read("turns", (store) => store.index("conversation").getAll(id)));
}

export const keep = (about) => write((conversations) => conversations.put(about));
export const keepTurn = (turn) => write((_, turns) => turns.put(turn), [turn]);
export const keepAll = (conversation) =>
  write(
    (conversations, turns) => {
      conversations.put(conversation.about);
      for (const turn of conversation.turns.values()) turns.put(turn);
    },
    [...conversation.turns.values()],
  );
export const forget = (conversation) =>
  write((conversations, turns) => {
    conversations.delete(conversation.about.id);
    for (const id of conversation.turns.keys()) turns.delete(id);
  });
export const forgetTurns = (gone) => write((_, turns) => gone.forEach(({ id }) => turns.delete(id)));
export const forgetAll = () =>
  write((conversations, turns) => [conversations, turns].forEach((store) => store.clear()));

/** The identities of the conversations whose title or turns have all of these words. */
export async function found(words) {
  const texts = new Map((await listed()).map(({ id, title }) => [id, [title]]));
  for (const { conversation, text } of await read("turns", (store) => store.getAll())) {
    texts.get(conversation)?.push(text);
  }
  return new Set([...texts].filter(([, all]) => matches(words, all)).map(([id]) => id));
}

// --- one conversation ----------------------------------------------------------------------------------------

export class Conversation {
  /** `about` is what is kept of it beside its turns. */
  constructor(about, turns = []) {
    this.about = about;
    this.turns = new Map();
    this.children = new Map();
    for (const turn of turns.sort((one, other) => one.at - other.at)) this.#insert(turn);
  }

  static begun(models = [], settings = {}) {
    const id = identity("c");
    const about = {
      id,
      title: "",
      at: Date.now(),
      models,
      settings,
      chosen: [{}, {}],
      draft: { text: "", files: [] },
    };
    return new Conversation(about);
  }

  get isCompared() {
    return this.about.models.length > 1;
  }

  #insert(turn) {
    this.turns.set(turn.id, turn);
    const parent = turn.parent ?? BEGINNING;
    this.children.set(parent, [...(this.children.get(parent) ?? []), turn]);
  }

  /** A new turn after `parent`, or at the beginning; shown in these lanes. */
  add(parent, lanes, more) {
    const last = Math.max(0, ...[...this.turns.values()].map(({ at }) => at));
    const at = Math.max(Date.now(), last + 1); // in order, whatever the clock does
    const turn = {
      id: identity("t"),
      conversation: this.about.id,
      parent: parent?.id ?? null,
      at,
      text: "",
      files: [],
      ...more,
    };
    this.#insert(turn);
    for (const lane of lanes) this.choose(turn, lane);
    if (!this.about.title && turn.role === "user") this.about.title = titleOf(turn);
    this.about.at = at;
    return turn;
  }

  choose(turn, lane) {
    this.about.chosen[lane][turn.parent ?? BEGINNING] = turn.id;
  }

  /** What is shown in a lane, from the beginning. */
  path(lane) {
    const path = [];
    for (let at = BEGINNING; ; at = path.at(-1).id) {
      const next = this.children.get(at) ?? [];
      if (!next.length) return path;
      path.push(next.find(({ id }) => id === this.about.chosen[lane][at]) ?? next.at(-1));
    }
  }

  /** What comes before a turn, from the beginning. */
  before(turn) {
    const path = [];
    for (let at = turn.parent; at; at = path[0].parent) path.unshift(this.turns.get(at));
    return path;
  }

  siblings(turn) {
    return this.children.get(turn.parent ?? BEGINNING).filter(({ role }) => role === turn.role);
  }

  /** Takes out a turn and all that follows it; they are returned, for `restore`. */
  remove(turn) {
    const parent = turn.parent ?? BEGINNING;
    this.children.set(
      parent,
      this.children.get(parent).filter((other) => other !== turn),
    );
    const gone = [turn];
    for (const one of gone) gone.push(...(this.children.get(one.id) ?? []));
    for (const { id } of gone) {
      this.turns.delete(id);
      this.children.delete(id);
    }
    return gone;
  }

  restore(gone) {
    for (const turn of gone) this.#insert(turn);
    const parent = gone[0].parent ?? BEGINNING;
    this.children.get(parent).sort((one, other) => one.at - other.at);
  }
}

const titleOf = ({ text, files }) =>
  (text.trim().split("\n")[0] || files[0]?.name || "Conversation").slice(0, TITLE_LENGTH);

// --- export and import ---------------------------------------------------------------------------------------

const FORMAT = "llama-router chat";

/** Conversations as a JSON document, images included. */
export async function exported(conversations) {
  const whole = async ({ about, turns }) => {
    const { draft: _, ...rest } = about;
    return { ...rest, turns: await Promise.all([...turns.values()].map(portable)) };
  };
  const document = { format: FORMAT, version: 1, conversations: await Promise.all(conversations.map(whole)) };
  return JSON.stringify(document, null, 1);
}

async function portable({ conversation: _, ...turn }) {
  const files = turn.files.map(async ({ blob, ...file }) => (blob ? { ...file, url: await dataUrl(blob) } : file));
  return { ...turn, files: await Promise.all(files) };
}

export const dataUrl = (blob) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });

/** The conversations of an exported document, as new ones. Throws an Error that says what is wrong with it. */
export function imported(text) {
  let document;
  try {
    document = JSON.parse(text);
  } catch (error) {
    throw new Error(`it is no JSON (${error.message})`);
  }
  if (document?.format !== FORMAT || !Array.isArray(document.conversations)) {
    throw new Error("it is no export of this chat");
  }
  return document.conversations.map(importedOne);
}

function importedOne({ title, at, models, settings, chosen, turns }, index) {
  const bad = (what) => new Error(`conversation ${index + 1}: ${what}`);
  if (!Array.isArray(turns)) throw bad("it has no turns");
  const conversation = Conversation.begun(listOf(models, String).slice(0, 2), settingsOf(settings));
  const { about } = conversation;
  about.title = String(title ?? "").slice(0, 500);
  about.at = Number(at) || Date.now();
  const ids = new Map([[null, null]]);
  const read = [];
  for (const turn of turns) {
    if (!["user", "assistant"].includes(turn?.role) || typeof turn.text !== "string")
      throw bad("a turn says nothing");
    if (!ids.has(turn.parent)) throw bad("a turn follows none");
    ids.set(turn.id, identity("t"));
    read.push({
      ...importedTurn(turn),
      id: ids.get(turn.id),
      parent: ids.get(turn.parent),
      conversation: about.id,
    });
  }
  about.chosen = [0, 1].map((lane) => {
    const entries = Object.entries(chosen?.[lane] ?? {});
    return Object.fromEntries(
      entries
        .filter(([, to]) => ids.has(to))
        .map(([from, to]) => [from ? (ids.get(from) ?? from) : from, ids.get(to)]),
    );
  });
  return new Conversation(about, read);
}

const NUMBERS = [
  "thoughtSec",
  "firstSec",
  "waitedSec",
  "loadedSec",
  "tokens",
  "rate",
  "promptTokens",
  "cachedTokens",
];
const TEXTS = ["model", "thought", "state", "error", "request", "kv", "finish"];

function importedTurn(turn) {
  const read = {
    role: turn.role,
    text: turn.text,
    at: Number(turn.at) || 0,
    files: listOf(turn.files, importedFile),
  };
  for (const name of NUMBERS) if (Number.isFinite(turn[name])) read[name] = turn[name];
  for (const name of TEXTS) if (typeof turn[name] === "string") read[name] = turn[name];
  return read;
}

function importedFile({ kind, name, text, url }) {
  if (kind === "text") return { kind, name: String(name), text: String(text) };
  const found = /^data:(image\/(?:png|jpeg));base64,([\w+/]+=*)$/.exec(String(url));
  if (!found) throw new Error(`the image ${name} cannot be read`);
  const bytes = Uint8Array.from(atob(found[2]), (character) => character.charCodeAt(0));
  return { kind: "image", name: String(name), blob: new Blob([bytes], { type: found[1] }) };
}

const listOf = (value, make) => (Array.isArray(value) ? value.map(make) : []);

function settingsOf(settings) {
  const known = ["system", "temperature", "top_p", "max_tokens", "seed", "priority", "json"];
  return Object.fromEntries(
    known.filter((name) => settings?.[name]).map((name) => [name, String(settings[name])]),
  );
}

/** What a lane shows, as Markdown. */
export function asMarkdown({ about }, path) {
  const said = path.map(({ role, model, text, files }) => {
    const texts = files.map(({ kind, name, text: content }) =>
      kind === "text" ? fenced(name, content) : `[image: ${name}]`,
    );
    return `## ${role === "user" ? "You" : model}\n\n${[...texts, text.trim()].join("\n\n")}\n`;
  });
  const system = about.settings.system ? [`> ${about.settings.system.replaceAll("\n", "\n> ")}\n`] : [];
  return [`# ${about.title}\n`, ...system, ...said].join("\n");
}

/** A file as the model reads it: its name, and its text in a fence that is longer than any in it. */
export function fenced(name, text) {
  const longest = Math.max(2, ...[...text.matchAll(/^ *(`{3,})/gm)].map(([, ticks]) => ticks.length));
  const fence = "`".repeat(longest + 1);
  return `${name}:\n${fence}\n${text.replace(/\n$/, "")}\n${fence}`;
}
