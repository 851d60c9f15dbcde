// The chat: conversations with models, and trials of models that do something else.

import { allow, announce, put, show } from "../drawing.js";
import { known } from "../known.js";
import { tell } from "../notice.js";
import { address } from "../routes.js";
import { Answer } from "./answer.js";
import {
  asMarkdown,
  Conversation,
  exported,
  forget,
  forgetAll,
  forgetTurns,
  found,
  imported,
  keep,
  keepAll,
  keepTurn,
  listed,
  opened,
  unwritten,
} from "./conversations.js";
import { attached, MOST_FILES } from "./files.js";
import { arrange, button, download, make, stayAtEnd } from "./making.js";
import { can, offer, sees, usedBy } from "./models.js";
import { countOf, settingsForm } from "./settings.js";
import { tabsOf } from "./tabs.js";
import { fileView, TurnView } from "./turns.js";
import { waitOf } from "./waiting.js";

const KEPT_EACH_MS = 1_000; // while an answer comes
const DRAFT_MS = 300;
const LAST = "llama-router conversation"; // which one this tab shows
const LEFT = "llama-router unkept"; // what a page was left with: when it goes, no database may be written any more
const NEW = "new";

let current = null; // the conversation that is shown
const inMemory = new Map(); // those that were opened, by identity: who writes into one has the one that is shown
const running = new Map(); // answers that come, by the identity of their turn
const views = new Map(); // of the turns that are shown, by identity
let files = []; // of the message that is being written
let undo = null;
let parts; // the elements of the view
let tabs; // of models for something else

export const view = {
  name: "chat",
  title: "Chat",
  start(root) {
    parts = layOut(root);
    listen();
    tabs = tabsOf(parts);
    addEventListener("pagehide", leave);
    document.addEventListener("visibilitychange", () => document.hidden && keepAtOnce());
  },
  show(path, query) {
    if (!tabs.open(path[0])) {
      open(path[0] ?? "", query.get("model") ?? "").catch((error) =>
        tell(`The conversation cannot be read: ${error.message}`),
      );
    }
    if (matchMedia("(pointer: fine)").matches) parts.text.focus({ preventScroll: true });
  },
  hide: keepAtOnce,
  draw() {
    drawModels();
    tabs.draw();
    for (const id of running.keys()) views.get(id) && drawTurn(views.get(id));
  },
};

/** Keeps what would be lost with the page in its tab, for `comeBack`. */
function leave() {
  const all = [...unwritten, ...[...running.values()].map(({ turn }) => turn)];
  const turns = all.filter((turn) => !turn.files.some(({ blob }) => blob)); // images are no text
  const about = current && { ...current.about, draft: { text: parts.text.value, files: [] } };
  try {
    sessionStorage.setItem(LEFT, JSON.stringify({ turns, about }));
  } catch (error) {
    console.warn(`not all is kept: ${error.message}`); // a tab has room for some 5 MB
  }
}

/** Puts what was left where it belongs, once. */
async function comeBack() {
  const left = sessionStorage.getItem(LEFT);
  sessionStorage.removeItem(LEFT);
  if (!left || inMemory.size) return;
  const { turns, about } = JSON.parse(left);
  for (const turn of turns) await keepTurn(turn);
  if (!about?.draft.text && !about?.title) return;
  const before = await opened(about.id);
  await keep({ ...about, draft: { files: before?.about.draft?.files ?? [], text: about.draft.text } });
}

let unkept = ""; // why, if that was told

/** Keeping fails where a browser keeps nothing, or has no room: then a conversation lives as long as its page. */
async function kept(promise) {
  try {
    return await promise;
  } catch (error) {
    const problem = `This browser does not keep the conversation: ${error?.message ?? error}`;
    if (unkept !== problem) tell(problem);
    unkept = problem;
    return undefined;
  }
}

// --- its elements, and what they do --------------------------------------------------------------------------

function layOut(root) {
  root.append(make("link", { rel: "stylesheet", href: "page/chat/chat.css" }));
  const named = [...root.querySelectorAll("[data-part]")].map((node) => [node.dataset.part, node]);
  const all = Object.fromEntries(named);
  const settings = settingsForm(changeSettings);
  all.settings.append(settings.form);
  const lanes = [...root.querySelectorAll(".lane")].map((lane) => {
    const [name, only, turns] = ["h3", "button", ".turns"].map((each) => lane.querySelector(each));
    return { root: lane, name, only, turns };
  });
  const sight = new IntersectionObserver(approach, { root: all.log, rootMargin: "1000px 0px" });
  return { ...all, settings, lanes, sight, models: [all.model, all.second] };
}

function listen() {
  const on = (name, event, act) => parts[name].addEventListener(event, act);
  on("search", "input", later(listAll, 200));
  on("exportAll", "click", exportAll);
  on("import", "click", () => parts.imported.click());
  on("imported", "change", importFile);
  on("removeAll", "click", removeAll);
  parts.models.forEach((select, lane) => select.addEventListener("change", () => chooseModel(lane, select.value)));
  on("compare", "click", toggleComparison);
  on("title", "input", rename);
  on("exportOne", "click", exportOne);
  on("exportMarkdown", "click", exportMarkdown);
  on("removeOne", "click", removeConversation);
  parts.lanes.forEach(({ only }, lane) => only.addEventListener("click", () => keepLane(lane)));
  on("undo", "click", takeBack);
  on("text", "input", noteDraft);
  on("text", "paste", pasted);
  on("text", "keydown", keyInMessage);
  on("attach", "click", () => parts.chosen.click());
  on("chosen", "change", () => attach(parts.chosen.files).then(() => (parts.chosen.value = "")));
  on("composer", "submit", submitted);
  on("chat", "dragover", (event) => event.preventDefault());
  on("chat", "drop", (event) => {
    event.preventDefault();
    attach(event.dataTransfer.files);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !event.defaultPrevented && parts.chat.checkVisibility()) escaped(event);
  });
  document.addEventListener("click", ({ target }) => {
    for (const each of [parts.menu, parts.more]) if (each.open && !each.contains(target)) each.open = false;
  });
  const unfold = () => (parts.side.open = wide.matches);
  wide.addEventListener("change", unfold);
  unfold();
}

const wide = matchMedia("(min-width: 56rem)"); // has room for the list of conversations beside the one

function later(act, milliseconds) {
  let timer;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(act, milliseconds);
  };
}

// --- which conversation is shown -----------------------------------------------------------------------------

let openings = 0;

async function open(id, model) {
  const opening = (openings += 1);
  await kept(comeBack());
  const all = (await kept(listed())) ?? [];
  const wanted = id || (model ? NEW : (sessionStorage.getItem(LAST) ?? NEW));
  const there = wanted === NEW ? undefined : (inMemory.get(wanted) ?? (await kept(opened(wanted))));
  const next = there ?? (await unsent(all));
  if (opening !== openings) return; // somebody has gone on meanwhile
  complain(id && id !== NEW && !there ? "This conversation is not kept in this browser." : "");
  if (model) next.about.models[0] = model;
  if (id !== NEW && !(id && there))
    history.replaceState(null, "", address("chat", [isSent(next) ? next.about.id : NEW]));
  turnTo(next);
  foldSide();
  await listAll();
}

const isSent = ({ about }) => about.title !== "";

/** The conversation that was not begun yet, with its draft. */
async function unsent(all) {
  for (const conversation of inMemory.values()) if (!isSent(conversation)) return conversation;
  const begun = all.find(({ title }) => title === "");
  if (begun) return new Conversation(begun);
  const models = all.find((about) => about.models.length)?.models.slice(0, 1);
  return Conversation.begun(models);
}

function turnTo(conversation) {
  keepAtOnce();
  const typed = current ? "" : parts.text.value; // before the first conversation was there
  current = conversation;
  const { about } = conversation;
  inMemory.set(about.id, conversation);
  sessionStorage.setItem(LAST, isSent(conversation) ? about.id : NEW);
  views.clear();
  parts.sight.disconnect();
  offerUndo(null);
  files = about.draft?.files ?? [];
  parts.text.value = typed || (about.draft?.text ?? "");
  parts.settings.show(about.settings);
  put(parts.title, about.title, "value");
  drawModels();
  drawFiles();
  drawConversation();
  parts.log.scrollTop = parts.log.scrollHeight;
}

function foldSide() {
  if (!wide.matches) parts.side.open = false;
}

async function listAll() {
  const words = parts.search.value.trim();
  const [all, wanted] = [(await kept(listed())) ?? [], words ? await kept(found(words)) : null];
  const shown = all.filter(({ id, title }) => title && (!wanted || wanted.has(id)));
  arrange(
    parts.list,
    shown.map(({ id, title, at }) => {
      const link = make("a", { href: address("chat", [id]), title }, title);
      if (id === current?.about.id) link.ariaCurrent = "page";
      return make("li", {}, link, make("small", {}, new Date(at).toLocaleDateString()));
    }),
  );
  show(parts.none, !shown.length || Boolean(words));
  put(parts.none, words ? `${shown.length} of ${all.filter(({ title }) => title).length}` : "None yet.");
}

// --- drawing the conversation --------------------------------------------------------------------------------

const lanesOf = (conversation) => (conversation.isCompared ? [0, 1] : [0]);

function drawConversation() {
  const paths = lanesOf(current).map((lane) => current.path(lane));
  const [first, second = first] = paths;
  const fork = first.findIndex((turn, index) => turn !== second[index]);
  const shared = fork < 0 ? Math.min(first.length, second.length) : fork;
  const isSplit = current.isCompared && paths.some((path) => path.length > shared);
  arrange(parts.common, first.slice(0, isSplit ? shared : first.length).map(viewOf));
  show(parts.both, isSplit);
  parts.lanes.forEach(({ root, name, turns }, lane) => {
    arrange(turns, isSplit ? paths[lane].slice(shared).map(viewOf) : []);
    put(name, current.about.models[lane] ?? "");
    root.ariaLabel = current.about.models[lane] ?? "";
  });
  const shown = new Set(paths.flat().map(({ id }) => id));
  for (const id of [...views.keys()]) if (!shown.has(id)) views.delete(id);
  within(() => views.forEach(drawWhole));
  show(parts.empty, !first.length);
  drawState();
}

const within = (change) => stayAtEnd(parts.log, change);

function viewOf(turn) {
  if (!views.has(turn.id)) {
    const view = new TurnView(turn, actions);
    views.set(turn.id, { turn, view, timer: 0 });
    byRoot.set(view.root, view);
    parts.sight.observe(view.root);
  }
  return views.get(turn.id).view.root;
}

const byRoot = new WeakMap();

/** Tells turns that they come into sight. */
function approach(entries) {
  within(() => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      parts.sight.unobserve(target);
      byRoot.get(target).approach();
    }
  });
}

const drawTurn = (shown) => within(() => drawWhole(shown));

function drawWhole({ turn, view: drawn }) {
  const answer = running.get(turn.id);
  const wait = answer && (waitOf(known, turn.request, usedBy(known, turn.model)) || answer.wait);
  drawn.draw({ siblings: current.siblings(turn), wait, isRunning: Boolean(answer) });
}

const runningHere = () => [...running.values()].filter(({ turn }) => turn.conversation === current?.about.id);

function drawState() {
  const isAnswering = runningHere().length > 0;
  put(parts.sender, isAnswering ? "Stop" : "Send");
  put(parts.compare, String(current.isCompared), "ariaPressed");
  show(parts.more, isSent(current));
  show(parts.models[1], current.isCompared);
  const count = countOf(current.about.settings);
  put(parts.settingsTitle, count ? `Settings (${count})` : "Settings");
  allow(parts.compare, !isAnswering);
}

/** The models that are offered, and what is known of the chosen one. */
function drawModels() {
  if (!current) return;
  const { about } = current;
  about.models[0] ||= firstModel();
  parts.models.forEach((select, lane) => offer(select, known, "completion", about.models[lane] ?? select.value));
  const names = about.models.filter(Boolean);
  put(parts.state, known.models.size ? names.map(stateOf).join(", ") : "");
}

function firstModel() {
  const chats = known.allCards.filter((card) => can(card, "completion")).map(({ id }) => id);
  return chats.find((name) => known.models.get(name)?.status === "ready") ?? chats[0] ?? "";
}

const STATES = { off: "not loaded", ready: "ready", loading: "loading …", asleep: "asleep", failed: "failed" };

function stateOf(name) {
  const { status } = known.models.get(usedBy(known, name)) ?? {};
  return status ? (STATES[status] ?? status) : "not served here";
}

// --- saying something ----------------------------------------------------------------------------------------

function submitted(event) {
  event.preventDefault();
  if (!current) return;
  if (runningHere().length) return stopAll();
  const text = parts.text.value;
  if (!text.trim() && !files.length) return;
  if (!maySend(files)) return;
  say(text, files);
  [parts.text.value, files] = ["", []];
  current.about.draft = { text: "", files: [] };
  drawFiles();
  kept(keep(current.about));
}

function maySend(withFiles) {
  const names = current.about.models;
  if (!names.every(Boolean)) return complain("Choose a model first.");
  const blind = withFiles.some(({ kind }) => kind === "image") && names.find((name) => !sees(known, name));
  return blind ? complain(cannotSee(blind)) : !complain("");
}

/** Says what is wrong below the conversation; returns whether nothing is. */
function complain(problem) {
  put(parts.complaint, problem);
  return false;
}

function cannotSee(name) {
  const others = known.allCards.filter((card) => can(card, "vision")).map(({ id }) => id);
  const hint = others.length ? ` These do: ${others.slice(0, 4).join(", ")}.` : "";
  return `${name} does not see images.${hint}`;
}

/** Adds a message at the end of each lane; where both still are the same, there is one for both. */
function say(text, withFiles) {
  const wasNew = !isSent(current);
  const lanes = lanesOf(current);
  const ends = lanes.map((lane) => current.path(lane).at(-1));
  const groups = ends.every((end) => end === ends[0]) ? [lanes] : lanes.map((lane) => [lane]);
  for (const group of groups) addMessage(ends[group[0]], group, text, withFiles);
  if (wasNew) {
    history.replaceState(null, "", address("chat", [current.about.id]));
    sessionStorage.setItem(LAST, current.about.id);
    put(parts.title, current.about.title, "value");
  }
  kept(keepAll(current)).then(listAll);
  offerUndo(null);
  drawConversation();
  parts.log.scrollTop = parts.log.scrollHeight;
}

function addMessage(parent, lanes, text, withFiles) {
  const message = current.add(parent, lanes, { role: "user", text, files: withFiles });
  for (const lane of lanes) answerTo(message, [lane], current.about.models[lane]);
}

/** Has a model answer a message, in these lanes. */
function answerTo(message, lanes, model) {
  const turn = current.add(message, lanes, { role: "assistant", model });
  begin(current, turn);
}

function begin(conversation, turn) {
  const { settings } = conversation.about;
  let keptAt = performance.now();
  const changed = () => {
    drawSoon(turn);
    if (performance.now() - keptAt < KEPT_EACH_MS) return;
    keptAt = performance.now();
    keepAnswer(turn);
  };
  const answer = new Answer(turn, conversation.before(turn), { settings, sees: sees(known, turn.model), changed });
  running.set(turn.id, answer);
  answer.over.then(() => {
    running.delete(turn.id);
    keepAnswer(turn);
    if (turn.state !== "stopped")
      announce(turn.state === "done" ? `${turn.model} has answered` : `${turn.model}: ${turn.error}`);
    if (conversation === current) drawConversation();
  });
}

/** In the next frame, or once the time for it has come. */
function drawSoon(turn) {
  const shown = views.get(turn.id);
  if (!shown || shown.timer) return;
  const draw = () => {
    shown.timer = 0;
    if (views.get(turn.id) === shown) drawTurn(shown);
  };
  const toGo = shown.view.due - performance.now();
  shown.timer = toGo > 16 ? setTimeout(draw, toGo + 1) : requestAnimationFrame(draw);
}

const stop = (turn) => {
  running.get(turn.id)?.stop();
  parts.text.focus({ preventScroll: true });
};
const stopAll = () => runningHere().forEach((answer) => answer.stop());

// --- what can be done with a turn ----------------------------------------------------------------------------

const lanesWith = (turn) => lanesOf(current).filter((lane) => current.path(lane).includes(turn));

function edit(turn) {
  const { view: drawn } = views.get(turn.id);
  if (drawn.root.querySelector("form")) return;
  const text = make("textarea", { rows: "3", "aria-label": "Your message, changed" });
  text.value = turn.text;
  const end = () => {
    form.remove();
    drawn.root.classList.remove("edited");
    parts.text.focus({ preventScroll: true });
  };
  const form = make(
    "form",
    {
      class: "edit",
      submit(event) {
        event.preventDefault();
        if (!text.value.trim() && !turn.files.length) return;
        if (runningHere().length) stopAll();
        if (!maySend(turn.files)) return;
        end();
        change(turn, text.value);
      },
      keydown(event) {
        if (event.key === "Escape") {
          event.preventDefault();
          end();
        } else if (isSend(event)) {
          event.preventDefault();
          form.requestSubmit();
        }
      },
    },
    text,
    make("div", { class: "row" }, make("button", {}, "Send"), button("Cancel", end)),
  );
  drawn.root.classList.add("edited");
  drawn.root.append(form);
  text.focus();
  text.setSelectionRange(text.value.length, text.value.length);
}

function change(turn, text) {
  const parent = turn.parent ? current.turns.get(turn.parent) : null;
  addMessage(parent, lanesWith(turn), text, turn.files);
  kept(keepAll(current));
  drawConversation();
}

/** Another answer beside this one; in place of it if it failed before it began. */
function again(turn) {
  const isNothing = turn.state === "failed" && !turn.text && !turn.thought;
  const lanes = lanesWith(turn);
  const model = current.about.models[lanes[0]] ?? turn.model;
  if (isNothing) {
    turn.model = model;
    begin(current, turn);
  } else answerTo(current.turns.get(turn.parent), lanes, model);
  kept(keepAll(current));
  drawConversation();
  parts.text.focus({ preventScroll: true });
}

function step(turn, by) {
  const siblings = current.siblings(turn);
  const next = siblings[(siblings.indexOf(turn) + by + siblings.length) % siblings.length];
  for (const lane of lanesWith(turn)) current.choose(next, lane);
  kept(keep(current.about));
  drawConversation();
  const { root } = views.get(next.id).view;
  root.querySelector(`.branches button:${by < 0 ? "first" : "last"}-of-type`).focus({ preventScroll: true });
}

function remove(turn) {
  const conversation = current;
  const gone = conversation.remove(turn);
  for (const { id } of gone) running.get(id)?.stop();
  kept(forgetTurns(gone));
  kept(keep(conversation.about));
  drawConversation();
  offerUndo(gone.length > 1 ? `Deleted ${gone.length} messages.` : "Deleted.", () => {
    conversation.restore(gone);
    kept(keepAll(conversation));
    drawConversation();
  });
}

const actions = { edit, again, remove, step, stop, within };

function offerUndo(text, act = null) {
  const hadFocus = parts.undone.contains(document.activeElement);
  undo = act;
  show(parts.undone, Boolean(text));
  put(parts.undone.firstElementChild, text ?? "");
  if (text) parts.undo.focus({ preventScroll: true });
  else if (hadFocus) parts.text.focus({ preventScroll: true });
}

function takeBack() {
  const act = undo;
  parts.text.focus({ preventScroll: true });
  offerUndo(null);
  act?.();
}

// --- two models side by side ---------------------------------------------------------------------------------

function chooseModel(lane, name) {
  current.about.models[lane] = name;
  complain("");
  kept(keepDraft());
  drawModels();
  drawConversation();
}

function toggleComparison() {
  const { about } = current;
  if (current.isCompared) return keepLane(0);
  const chats = known.allCards.filter((card) => can(card, "completion")).map(({ id }) => id);
  about.models[1] = chats.find((name) => name !== about.models[0]) ?? about.models[0];
  about.chosen[1] = { ...about.chosen[0] };
  kept(keepDraft());
  drawModels();
  drawConversation();
}

function keepLane(lane) {
  const { about } = current;
  about.chosen[0] = { ...about.chosen[lane] };
  about.models = [about.models[lane]];
  kept(keepDraft());
  drawModels();
  drawConversation();
  parts.text.focus({ preventScroll: true });
}

// --- the message that is being written -----------------------------------------------------------------------

const isSend = ({ key, shiftKey, isComposing }) => key === "Enter" && !shiftKey && !isComposing;

function keyInMessage(event) {
  if (isSend(event)) {
    event.preventDefault();
    if (!runningHere().length) parts.composer.requestSubmit();
  } else if (event.key === "ArrowUp" && !parts.text.value) {
    const last = current.path(0).findLast(({ role }) => role === "user");
    if (!last) return;
    event.preventDefault();
    edit(last);
  }
}

function escaped(event) {
  const menu = [parts.menu, parts.more].find((each) => each.open);
  if (menu) {
    menu.open = false;
    menu.firstElementChild.focus();
  } else if (runningHere().length) stopAll();
  else return;
  event.preventDefault();
}

async function attach(list) {
  if (!current) return;
  complain("");
  for (const file of list) {
    try {
      if (files.length >= MOST_FILES) throw new Error(`A message may have up to ${MOST_FILES} files.`);
      const made = await attached(file);
      const blind = made.kind === "image" && current.about.models.find((name) => !sees(known, name));
      if (blind) throw new Error(cannotSee(blind));
      files.push(made);
    } catch (error) {
      complain(error.message);
    }
  }
  drawFiles();
  kept(keepDraft());
  parts.text.focus({ preventScroll: true });
}

function pasted(event) {
  const { files: inside } = event.clipboardData;
  if (!inside.length) return;
  event.preventDefault();
  attach(inside);
}

function drawFiles() {
  show(parts.chips, files.length > 0);
  parts.chips.replaceChildren(
    ...files.map((file) => {
      const drop = () => {
        files = files.filter((other) => other !== file);
        drawFiles();
        noteDraft();
        parts.text.focus({ preventScroll: true });
      };
      return make(
        "li",
        {},
        fileView(file),
        button("Remove", drop, { class: "quiet", "aria-label": `Remove ${file.name}` }),
      );
    }),
  );
}

let draftIsNew = false;
const keepDraftSoon = later(() => keepAtOnce(), DRAFT_MS);

function noteDraft() {
  draftIsNew = true;
  keepDraftSoon();
}

function keepDraft() {
  draftIsNew = false;
  current.about.draft = { text: parts.text.value, files };
  return keep(current.about);
}

/** What would be lost with the page: the draft, and what has come of answers. */
function keepAtOnce() {
  if (!current) return;
  if (draftIsNew) kept(keepDraft());
  for (const { turn } of running.values()) keepAnswer(turn);
}

/** Keeps what has come of an answer, unless it was deleted meanwhile, alone or with its conversation. */
function keepAnswer(turn) {
  if (inMemory.get(turn.conversation)?.turns.has(turn.id)) kept(keepTurn(turn));
}

// --- the conversation as a whole -----------------------------------------------------------------------------

function changeSettings(settings) {
  current.about.settings = settings;
  kept(keepDraft());
  drawState();
}

function rename({ target: { value } }) {
  if (!value.trim() || !isSent(current)) return;
  current.about.title = value.trim();
  kept(keep(current.about)).then(listAll);
}

function removeConversation() {
  const gone = current;
  parts.more.open = false;
  stopAll();
  inMemory.delete(gone.about.id);
  draftIsNew = false;
  sessionStorage.removeItem(LAST);
  kept(forget(gone)).then(async () => {
    history.replaceState(null, "", address("chat", [NEW]));
    await open(NEW, "");
    offerUndo(`Deleted “${gone.about.title || "draft"}”.`, async () => {
      await kept(keepAll(gone));
      location.hash = address("chat", [gone.about.id]);
    });
  });
}

async function removeAll() {
  const all = await everything();
  if (!all.length) return;
  for (const answer of running.values()) answer.stop();
  inMemory.clear();
  draftIsNew = false;
  await kept(forgetAll());
  current = null;
  sessionStorage.removeItem(LAST);
  history.replaceState(null, "", address("chat", [NEW]));
  await open(NEW, "");
  offerUndo(`Deleted ${all.length} conversations.`, async () => {
    for (const conversation of all) await kept(keepAll(conversation));
    await listAll();
  });
}

async function everything() {
  const all = (await kept(listed())) ?? [];
  const read = await Promise.all(all.filter(({ title }) => title).map(({ id }) => inMemory.get(id) ?? opened(id)));
  return read.filter(Boolean);
}

const fileName = (title) =>
  title
    .replace(/[^\p{L}\p{N} _-]+/gu, "")
    .trim()
    .slice(0, 60) || "conversation";

async function exportOne() {
  download(`${fileName(current.about.title)}.json`, await exported([current]), "application/json");
}

async function exportAll() {
  download("conversations.json", await exported(await everything()), "application/json");
}

function exportMarkdown() {
  const [path] = lanesOf(current).map((lane) => current.path(lane));
  download(`${fileName(current.about.title)}.md`, asMarkdown(current, path), "text/markdown");
}

async function importFile({ target }) {
  const [file] = target.files;
  try {
    const read = imported(await file.text());
    for (const conversation of read) await keepAll(conversation);
    await listAll();
    announce(`${read.length} conversations imported`);
    if (read.length) location.hash = address("chat", [read[0].about.id]);
  } catch (error) {
    complain(`${file.name} cannot be imported: ${error.message}.`);
  }
  target.value = "";
}
