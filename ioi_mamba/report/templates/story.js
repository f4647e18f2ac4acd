"use strict";
// The figure at the top: pointing at a mark says it in words, choosing it opens the side panel, a layer's name hides the layer.
{
  const section = document.getElementById("story");
  const views = section ? [...section.querySelectorAll(".view")] : [];
  const says = section && section.querySelector(".says");
  const panel = section && section.querySelector("[data-panel]");
  const answers = panel && panel.querySelector(".answers"), pinned = panel && panel.querySelector(".pinned");
  let origin = null;

  function element(name, text, attributes = {}) {
    const made = document.createElement(name);
    made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }

  function unpin() {
    for (const mark of section.querySelectorAll(".pinned-mark")) mark.classList.remove("pinned-mark");
    pinned.hidden = true;
    answers.hidden = false;
    if (origin) origin.focus();
    origin = null;
  }

  function pin(view, mark) {
    const [marks, prompts] = JSON.parse(view.querySelector("script").textContent);
    const said = marks[mark.dataset.mark];
    for (const other of section.querySelectorAll(".pinned-mark")) other.classList.remove("pinned-mark");
    mark.classList.add("pinned-mark");
    origin = mark;
    const close = element("button", "Close", {type: "button", class: "close"});
    close.addEventListener("click", unpin);
    const list = document.createElement("ul");
    list.append(...said.parts.map(part => element("li", part)));
    const shown = element("div", "", {class: "prompts"});
    showPrompts(shown, prompts, said.label);
    const where = element("p", "");
    where.append(element("a", said.title, {href: "#" + said.section}));
    pinned.replaceChildren(close, element("p", said.says, {class: "chosen"}), element("p", said.number), shown,
      ...(said.parts.length ? [element("h3", "Also in this layer"), list] : []), where);
    pinned.hidden = false;
    answers.hidden = true;
    close.focus({preventScroll: true});
  }

  function count(view) {
    const line = view.querySelector(".count"), all = [...view.querySelectorAll(".mark")];
    const seen = all.filter(mark => !mark.classList.contains("off")).length;
    const {left, edges} = line.dataset;
    const more = [[edges, "weaker edges"], [left, "marks on folded layers"]].filter(([n]) => n !== "0").map(([n, what]) => `${n} ${what}`);
    line.textContent = `${seen} of ${all.length} marks seen` + (more.length ? `; ${more.join(", ")} not drawn` : "");
    line.hidden = seen === all.length && !more.length;
  }

  function hide(view, row) {
    const off = row.classList.toggle("hidden-layer");
    row.setAttribute("aria-pressed", off);
    const hidden = new Set([...view.querySelectorAll(".hidden-layer")].flatMap(each => each.dataset.layers.split(" ")));
    for (const mark of view.querySelectorAll(".mark")) {
      const gone = mark.dataset.layers.split(" ").some(layer => hidden.has(layer));
      mark.classList.toggle("off", gone);
      mark.setAttribute("aria-hidden", gone);
    }
    count(view);
  }

  for (const view of views) {
    count(view);
    const marks = JSON.parse(view.querySelector("script").textContent)[0];
    const say = event => {
      const mark = event.target.closest(".mark");
      says.textContent = mark ? marks[mark.dataset.mark].says : "";
    };
    view.addEventListener("pointerover", say);
    view.addEventListener("focusin", say);
    view.addEventListener("click", event => {
      const mark = event.target.closest(".mark"), row = event.target.closest(".row[role]");
      if (mark) pin(view, mark);
      else if (row) hide(view, row);
    });
    view.addEventListener("keydown", event => {
      const here = event.target.closest("[role=button]");
      if (!here) return;
      if (event.key === "Enter" || event.key === " ") {
        if (here.classList.contains("mark")) pin(view, here);
        else hide(view, here);
      } else if (event.key.startsWith("Arrow")) {
        const there = nearest(view.querySelectorAll("[role=button]:not(.off)"), here, event.key);
        if (there) {
          here.setAttribute("tabindex", -1);
          there.setAttribute("tabindex", 0);
          there.focus();
        }
      } else return;
      event.preventDefault();
    });
  }
  if (section) {
    section.addEventListener("keydown", event => { if (event.key === "Escape" && !pinned.hidden) unpin(); });
    for (const button of section.querySelectorAll("button[data-view]")) {
      button.addEventListener("click", () => {
        if (!pinned.hidden) { origin = null; unpin(); }
        for (const other of section.querySelectorAll("button[data-view]")) other.setAttribute("aria-pressed", other === button);
        for (const view of views) view.hidden = view.dataset.view !== button.dataset.view;
        const example = views[button.dataset.view].querySelector("template").content.cloneNode(true);
        document.querySelector("[data-example]").replaceChildren(example);
        says.textContent = "";
        corruption = button.dataset.corruption;
        for (const drawing of drawings.values()) {
          if (Object.hasOwn(drawing.getState({data: () => false, signals: () => true}).signals, "shown")) drawing.signal("shown", corruption).runAsync();
        }
      });
    }
  }

  // A word's definition beside it, for as long as it is pointed at or has the focus.
  const box = document.getElementById("definition");
  const define = event => {
    const term = event.target.closest && event.target.closest("a.term");
    box.hidden = !term;
    if (!term) return;
    box.textContent = document.querySelector(term.getAttribute("href")).textContent;
    const at = term.getBoundingClientRect();
    box.style.left = Math.max(8, Math.min(at.left, innerWidth - box.offsetWidth - 8)) + "px";
    const below = at.bottom + 6;
    box.style.top = (below + box.offsetHeight < innerHeight ? below : at.top - box.offsetHeight - 6) + "px";
  };
  document.addEventListener("pointerover", define);
  document.addEventListener("focusin", define);
  document.addEventListener("keydown", event => { if (event.key === "Escape") box.hidden = true; });
  document.addEventListener("click", event => {
    const term = event.target.closest("a.term");
    if (term) document.querySelector(term.getAttribute("href")).closest("details").open = true;
  });
}
