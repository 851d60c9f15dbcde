// All models that the router serves; and a page of each.

import { element, show } from "../drawing.js";
import { drawList, needForList, showList, startList } from "./list.js";
import { drawModel, leaveModel, needForModel, showModel, startModel } from "./model.js";

let alias = "";

export const view = {
  name: "models",
  title: "Models",
  start() {
    startList();
    startModel();
  },
  show(path, query) {
    alias = path.join("/");
    show(element("model-list"), !alias);
    show(element("model-page"), alias);
    if (alias) showModel(alias);
    else showList(query);
    return alias || "Models";
  },
  hide() {
    leaveModel();
  },
  draw(known) {
    if (alias) drawModel(known);
    else drawList(known);
  },
  async ask(known) {
    if (alias) await needForModel();
    else await needForList(known);
  },
};
