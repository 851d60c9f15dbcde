// Markdown of models: from their text to elements, safely, and while it is still being written.
//
// marked makes HTML of it, and DOMPurify a fragment of that HTML in which only what is listed here is left. HTML in
// the text is shown as text, but for a few tags without attributes. Nothing is loaded from anywhere: images of other
// hosts become links.

import { Lexer, Marked } from "../vendor/marked.esm.js";
import "../vendor/purify.min.js";
import hljs from "../vendor/highlight/core.min.js";
import { copier, make } from "./making.js";

const { DOMPurify } = globalThis; // it is published as a script, not as a module

const MOST_OF_A_BLOCK = 10_000; // characters in which emphasis and the like is looked for: quadratic at worst
const TOO_DEEP = /^(?:[ \t]*(?:>|(?:[-*+]|\d+[.)])[ \t])){30}/m; // each quotation or list in another costs anew
const AT_ONCE = 20_000; // characters of blocks that are complete
const MOST_HIGHLIGHTED = 40_000;
const MOST_OF_MATH = 4_000;

const OF_HTML = "br|b|i|u|s|em|strong|sub|sup|kbd|mark|ins|del|small|details|summary|dl|dt|dd";
const ALLOWED = {
  ALLOWED_TAGS: [
    ...OF_HTML.split("|"),
    ...[
      "a",
      "blockquote",
      "code",
      "h1",
      "h2",
      "h3",
      "h4",
      "h5",
      "h6",
      "hr",
      "img",
      "input",
      "li",
      "ol",
      "p",
      "pre",
    ],
    ...["table", "tbody", "td", "th", "thead", "tr", "ul"],
  ],
  ALLOWED_ATTR: ["align", "alt", "checked", "class", "href", "src", "start", "title", "type"],
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:|data:image\/(?:png|jpeg|gif|webp);base64,)/i,
  ADD_URI_SAFE_ATTR: ["align", "checked", "start", "type"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
const HIGHLIGHTED = { ALLOWED_TAGS: ["span"], ALLOWED_ATTR: ["class"], RETURN_DOM_FRAGMENT: true };

// --- from text to a fragment ---------------------------------------------------------------------------------

const inlineMath = {
  name: "inlineMath",
  level: "inline",
  start: (text) => text.match(/\$|\\\(/)?.index,
  tokenizer(text) {
    const found =
      /^\\\((.+?)\\\)/s.exec(text.slice(0, MOST_OF_MATH)) ??
      /^\$\$([^$]+)\$\$/.exec(text.slice(0, MOST_OF_MATH)) ??
      /^\$(?![\s\d$])((?:\\.|[^\\\n$])+?)(?<!\s)\$(?![\d\w])/.exec(text.slice(0, MOST_OF_MATH));
    return found ? { type: "inlineMath", raw: found[0], text: found[1] } : undefined;
  },
  renderer: ({ text }) => `<code class="language-inlinemath">${escaped(text)}</code>`,
};

const blockMath = {
  name: "blockMath",
  level: "block",
  start: (text) => text.match(/(?:^|\n) {0,3}(?:\$\$|\\\[)/)?.index,
  tokenizer(text) {
    const found =
      /^ {0,3}\$\$([^$]+)\$\$[ \t]*(?:\n|$)/.exec(text.slice(0, MOST_OF_MATH)) ??
      /^ {0,3}\\\[(.+?)\\\][ \t]*(?:\n|$)/s.exec(text.slice(0, MOST_OF_MATH));
    return found ? { type: "blockMath", raw: found[0], text: found[1] } : undefined;
  },
  renderer: ({ text }) => `<pre><code class="language-math">${escaped(text)}</code></pre>`,
};

const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
const plainTags = new RegExp(`&lt;(/?(?:${OF_HTML}) ?/?)>`, "gi");

function html({ text, block }) {
  const shown = escaped(text).replaceAll(plainTags, "<$1>");
  return block && shown.includes("&lt;") ? `<p>${shown.trim().replaceAll("\n", "<br>")}</p>` : shown;
}

const marked = new Marked({ gfm: true });
marked.use({ extensions: [inlineMath, blockMath], renderer: { html } });

/** The elements of a text, or the text itself where Markdown is too much of it. */
function elementsOf(tokens) {
  try {
    return tidy(DOMPurify.sanitize(marked.parser(tokens), ALLOWED));
  } catch {
    return asItCame(tokens.map(({ raw }) => raw).join("")); // nested too deeply, for one
  }
}

function asItCame(text) {
  const fragment = new DocumentFragment();
  fragment.append(make("p", { class: "plain" }, text));
  return fragment;
}

function tidy(fragment) {
  for (const image of fragment.querySelectorAll("img")) tidyImage(image);
  for (const link of fragment.querySelectorAll("a")) tidyLink(link);
  for (const box of fragment.querySelectorAll("input")) {
    box.replaceWith(box.type === "checkbox" ? (box.hasAttribute("checked") ? "☑ " : "☐ ") : "");
  }
  for (const head of fragment.querySelectorAll("h1, h2, h3, h4, h5, h6")) {
    const level = `level-${head.localName[1]}`;
    head.replaceWith(make("h4", { class: level }, ...head.childNodes)); // below the speaker's, whatever it is
  }
  for (const table of fragment.querySelectorAll("table")) {
    const box = make("div", { class: "table", role: "group", "aria-label": "Table", tabindex: "0" });
    table.replaceWith(box);
    box.append(table);
  }
  const codes = new Map();
  for (const code of fragment.querySelectorAll("code")) {
    codes.set(code, /^language-([\w+#.-]{1,40})/.exec(code.className)?.[1].toLowerCase() ?? "");
  }
  for (const node of fragment.querySelectorAll("[class]:not([class^=level-]):not(.table)"))
    node.removeAttribute("class");
  for (const [code, language] of codes) {
    const isBlock = code.parentElement?.localName === "pre";
    if (language === "inlinemath" || (isBlock && language === "math")) drawMath(code, isBlock);
    else if (isBlock)
      code.parentElement.replaceWith(codeBlock(language, code.textContent.replace(/\n$/, "")).root);
  }
  return fragment;
}

function tidyImage(image) {
  const source = image.getAttribute("src") ?? "";
  if (source.startsWith("data:")) return;
  const words = image.alt || "image";
  image.replaceWith(source ? make("a", { href: source }, `[image: ${words}]`) : `[image: ${words}]`);
}

function tidyLink(link) {
  if (!/^(?:https?|mailto):/i.test(link.getAttribute("href") ?? "")) link.replaceWith(...link.childNodes);
  else {
    link.target = "_blank";
    link.rel = "noopener noreferrer";
  }
}

// --- code ----------------------------------------------------------------------------------------------------

const LANGUAGES = "bash cpp diff go java javascript json python rust sql xml yaml".split(" ");
const NAMES = new Map(
  [
    ...["c cpp", "c++ cpp", "h cpp", "html xml", "svg xml", "js javascript", "jsx javascript", "mjs javascript"],
    ...[
      "ts javascript",
      "tsx javascript",
      "typescript javascript",
      "patch diff",
      "py python",
      "rs rust",
      "sh bash",
    ],
    ...["shell bash", "console bash", "zsh bash", "yml yaml", "golang go"],
  ].map((pair) => pair.split(" ")),
);

const loading = new Map(); // by language

function grammar(language) {
  if (!loading.has(language)) {
    const load = import(`../vendor/highlight/languages/${language}.min.js`);
    loading.set(
      language,
      load.then((module) => hljs.registerLanguage(language, module.default)),
    );
  }
  return loading.get(language);
}

/** A block of code with its language and a button that copies it; `add` continues it, `finish` colours it. */
function codeBlock(language, text) {
  const code = make("code", {}, text);
  const words = code.firstChild ?? code.appendChild(new Text());
  const name = language || "text";
  const root = make(
    "figure",
    { class: "code" },
    make(
      "figcaption",
      {},
      make("span", {}, name),
      copier(() => code.textContent, { "aria-label": `Copy ${name}` }),
    ),
    make("pre", { tabindex: "0", role: "group", "aria-label": `Code: ${name}` }, code),
  );
  return { root, words, code, language };
}

async function colour({ code, language }) {
  const known = NAMES.get(language) ?? language;
  const text = code.textContent;
  if (!LANGUAGES.includes(known) || text.length > MOST_HIGHLIGHTED) return;
  try {
    await grammar(known);
    const { value } = hljs.highlight(text, { language: known, ignoreIllegals: true });
    if (code.textContent === text) code.replaceChildren(DOMPurify.sanitize(value, HIGHLIGHTED));
  } catch (error) {
    console.warn(`${known} is not highlighted: ${error.message}`);
  }
}

function colourAll(root) {
  for (const figure of root.matches("figure") ? [root] : root.querySelectorAll("figure.code")) {
    colour({ code: figure.querySelector("code"), language: figure.querySelector("figcaption span").textContent });
  }
}

// --- math ----------------------------------------------------------------------------------------------------

let temml;

/** Makes MathML of TeX. Until it is there, and where it cannot be read, the TeX is left. */
async function drawMath(code, isBlock) {
  const tex = code.textContent;
  if (tex.length > MOST_OF_MATH) return;
  const box = make("span", { class: isBlock ? "math block" : "math" });
  try {
    temml ??= import("../vendor/temml.min.js");
    (await temml).default.render(tex, box, {
      displayMode: isBlock,
      throwOnError: true,
      maxSize: [20, 20],
      maxExpand: 500,
    });
    (isBlock ? code.parentElement : code)?.replaceWith(box);
  } catch {
    // It stays as it is.
  }
}

// --- while it is being written -------------------------------------------------------------------------------

/**
 * The elements of a text that grows. What a later line cannot change any more is drawn once; what follows, at each
 * call. The time between calls grows with the time that they take, so that one endless block costs no more than a
 * share; and of much text, a part is drawn in each frame. `within` is called with each later change.
 */
export class Rendering {
  #root;
  #within;
  #settled = ""; // the part of the text that is drawn for good
  #tail = make("div", { class: "tail" });
  #open = null; // the block of code that is being written
  #links = {}; // definitions of links so far
  #next = 0;
  #atOnce = AT_ONCE;

  constructor(root, within) {
    this.#root = root;
    this.#within = within;
    root.replaceChildren(this.#tail);
  }

  /** When it may be called next, by the clock of `performance.now()`, while the text grows. */
  due = 0;

  draw(text, isOver) {
    if (!text.startsWith(this.#settled)) this.#begin();
    if (isOver && Object.keys(this.#links).length) this.#begin(); // of which some may have come after their use
    this.#goOn(text, isOver);
  }

  #goOn(text, isOver) {
    cancelAnimationFrame(this.#next);
    const begun = performance.now();
    const whole = text.slice(this.#settled.length);
    const rest = whole.slice(0, this.#atOnce);
    const isLast = rest.length === whole.length;
    const tokens = this.#read(rest);
    const final = isOver && isLast ? tokens.length : this.#finalOf(tokens, rest);
    if (final) this.#settle(tokens.slice(0, final));
    this.#atOnce = final ? AT_ONCE : 2 * this.#atOnce; // a block may be longer than that
    if (isLast) this.#drawTail(tokens.slice(final));
    else this.#next = requestAnimationFrame(() => this.#within(() => this.#goOn(text, isOver)));
    this.due = performance.now() + 4 * (performance.now() - begun);
  }

  #settle(tokens) {
    const fragment = elementsOf(tokens);
    const added = [...fragment.children];
    this.#tail.before(fragment);
    for (const node of added) colourAll(node);
    for (const { raw } of tokens) this.#settled += raw;
  }

  #begin() {
    this.#settled = "";
    this.#atOnce = AT_ONCE;
    this.#open = null;
    this.#tail.replaceChildren();
    this.#root.replaceChildren(this.#tail);
  }

  #read(text) {
    if (TOO_DEEP.test(text)) return [plainToken(text)];
    try {
      const lexer = new Lexer(marked.defaults);
      lexer.tokens.links = this.#links;
      const tokens = lexer.blockTokens(text, lexer.tokens);
      for (const { src, tokens: inner } of lexer.inlineQueue) {
        if (src.length > MOST_OF_A_BLOCK) inner.push(textToken(src));
        else lexer.inlineTokens(src, inner);
      }
      if (tokens.reduce((sum, { raw }) => sum + raw.length, 0) === text.length) return tokens;
      return Object.assign(tokens, { isInexact: true });
    } catch {
      return [plainToken(text)];
    }
  }

  /** How many of the blocks nothing can change any more: those before another one whose first line is complete. */
  #finalOf(tokens, text) {
    if (tokens.isInexact) return 0;
    const complete = text.lastIndexOf("\n") + 1;
    let [end, final] = [0, 0];
    tokens.forEach(({ type, raw }, index) => {
      const firstLine = end + raw.length - raw.trimStart().length;
      const lineEnd = text.indexOf("\n", firstLine);
      if (type !== "space" && index && lineEnd >= 0 && lineEnd < complete) final = index;
      end += raw.length;
    });
    return final;
  }

  #drawTail(tokens) {
    const [{ type, lang, text, codeBlockStyle } = {}, more] = tokens.filter((token) => token.type !== "space");
    if (type !== "code" || codeBlockStyle === "indented" || more) {
      this.#open = null;
      this.#tail.replaceChildren(...(tokens.length ? [elementsOf(tokens)] : []));
      return;
    }
    const language = /^[\w+#.-]{1,40}/.exec(lang ?? "")?.[0].toLowerCase() ?? "";
    if (this.#open?.language !== language || !text.startsWith(this.#open.words.data)) {
      this.#open = codeBlock(language, "");
      this.#tail.replaceChildren(this.#open.root);
    }
    this.#open.words.appendData(text.slice(this.#open.words.length));
  }
}

const textToken = (text) => ({ type: "text", raw: text, text, escaped: false });
const plainToken = (text) => ({ type: "paragraph", raw: text, text, tokens: [textToken(text)] });
