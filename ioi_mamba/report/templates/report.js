"use strict";
// Draws every chart of the page, as wide as there is room; fills the contents; sorts and saves tables.
const options = {renderer: "svg", actions: {export: true, source: false, compiled: false, editor: false}, tooltip: readTooltip};
const AXIS_WIDTH = 106, MENU_WIDTH = 40, FULL = 800, NARROW = 900, SMALL = 150;
let corruption = document.querySelector("[data-corruption]")?.dataset.corruption; // shown in all charts that have it
const drawings = new Map();

// The views of a chart in groups that share the width of the page: {views, wide: their pixels side by side, axes: how many}.
function groups(spec) {
  const merged = parts => ({views: parts.flatMap(part => part.views), wide: Math.max(0, ...parts.map(part => part.wide)),
    axes: Math.max(0, ...parts.map(part => part.axes))});
  const beside = (parts, times = 1) => parts.length ? [{views: parts.flatMap(part => part.views),
    wide: times * parts.reduce((sum, part) => sum + part.wide, 0), axes: times * parts.reduce((sum, part) => sum + part.axes, 0)}] : [];
  if (spec.vconcat) return spec.vconcat.flatMap(groups);
  if (spec.hconcat) return beside(spec.hconcat.map(child => merged(groups(child))));
  if (spec.concat) return beside([merged(spec.concat.flatMap(groups))], spec.columns || spec.concat.length);
  if (spec.facet) return beside([merged(groups(spec.spec))], spec.columns || 1);
  return typeof spec.width === "number" ? [{views: [spec], wide: spec.width, axes: 1}] : [];
}

// Pixels of each panel of a chart of panels that are equally wide; undefined of any other chart.
function panelWidth(spec) {
  const panels = spec.facet ? [spec.spec] : spec.concat || [];
  return panels.length && panels.every(panel => panel.width === panels[0].width) ? panels[0].width : undefined;
}

// Fewer labels below a view: none beside a position with a name of its own, as n3+1 is, and of the others those that fit.
function thinned(view) {
  const axis = view.encoding?.x?.axis;
  if (axis) {
    const text = axis.labelExpr || "datum.label";
    Object.assign(axis, {labelOverlap: "greedy", labelSeparation: 1, labelExpr: `test(/\\w[+-]\\d+$/, ${text}) ? '' : ${text}`});
  }
  (view.layer || []).forEach(thinned);
}

// A copy of a chart as wide as the element: panels in fewer columns, views wider or narrower, on a narrow page one below the other. less: pixels to spare.
function fitted(spec, element, less) {
  const copy = structuredClone(spec), room = element.clientWidth;
  if (room < NARROW && copy.hconcat?.every(child => groups(child).some(group => group.wide >= SMALL))) {
    copy.vconcat = copy.hconcat;
    delete copy.hconcat;
  }
  if (copy.columns && panelWidth(copy)) {
    copy.columns = Math.max(1, Math.min(copy.columns, Math.floor(room / (panelWidth(copy) + AXIS_WIDTH))));
  }
  for (const {views, wide, axes} of groups(copy)) {
    const own = room - MENU_WIDTH - axes * AXIS_WIDTH;
    const target = less ? Math.min(own, wide) - less : wide > own || wide > FULL ? own : wide;
    for (const view of views) {
      view.width = Math.max(30, Math.floor(view.width * target / wide));
      if (target < 0.95 * wide) thinned(view);
    }
  }
  const chosen = copy.params?.find(param => param.name === "shown");
  if (chosen?.bind?.options.includes(corruption)) chosen.value = corruption;
  return copy;
}

// What a mark says stands in a line at the lower edge of the window, where it covers no other mark.
function read(text) {
  const line = document.getElementById("reading");
  line.textContent = text;
  line.hidden = !text;
}
function readTooltip(handler, event, item, value) {
  read(value && typeof value === "object" ? Object.entries(value).map(([key, each]) => `${key}: ${each}`).join("   ") : value || "");
}

// The nearest of some elements in the direction of an arrow key, of those that lie more that way than to the side.
function nearest(elements, from, key) {
  const middle = each => { const box = each.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; };
  const [x, y] = middle(from);
  const along = {ArrowRight: ([a, b]) => [a - x, b - y], ArrowLeft: ([a, b]) => [x - a, b - y],
    ArrowDown: ([a, b]) => [b - y, a - x], ArrowUp: ([a, b]) => [y - b, a - x]}[key];
  let best = null, least = Infinity;
  for (const each of elements) {
    const [ahead, aside] = along(middle(each));
    const far = ahead + 3 * Math.abs(aside);
    if (each !== from && ahead > 1 && far < least) [best, least] = [each, far];
  }
  return best;
}

// A chart by keyboard: arrows go from mark to mark and read it, Enter chooses it as a click does.
function withKeys(element) {
  let at = null;
  const go = mark => {
    at?.classList.remove("at");
    at = mark;
    at?.classList.add("at");
    read(at ? at.getAttribute("aria-label") : "");
  };
  element.addEventListener("blur", () => go(null));
  element.addEventListener("keydown", event => {
    if (event.target !== element) return;
    const marks = [...element.querySelectorAll("svg.marks [role=graphics-symbol][aria-label]")];
    if (event.key.startsWith("Arrow") && marks.length) {
      go(at && at.isConnected ? nearest(marks, at, event.key) ?? at : marks[0]);
    } else if (event.key === "Enter" && at) {
      const box = at.getBoundingClientRect();
      const place = {bubbles: true, clientX: box.x + box.width / 2, clientY: box.y + box.height / 2};
      for (const kind of ["mousemove", "click"]) at.dispatchEvent(new MouseEvent(kind, place));
    } else return;
    event.preventDefault();
  });
}

// The prompts in a grid, the clean one above the corrupted one, the token at one position marked; corruption: only those of
// this one, if given.
function showPrompts(box, examples, label, corruption) {
  const shown = examples.filter(e => e.positions.includes(label) && (corruption === undefined || e.corruption === corruption));
  box.replaceChildren(...shown.map(example => {
    const grid = document.createElement("div");
    grid.className = "example";
    for (const side of ["clean", "corrupted"]) {
      const line = document.createElement("div");
      line.className = "side";
      const name = document.createElement("span"), text = document.createElement("span");
      [name.className, name.textContent, text.className] = ["name", side, "text"];
      example[side].forEach((token, index) => {
        if (example.positions[index] === "BOS" && label !== "BOS") return;
        const chosen = example.positions[index] === label, changed = example.clean[index] !== example.corrupted[index];
        const place = document.createElement(chosen ? "mark" : changed ? "u" : "span");
        place.textContent = token;
        text.append(place);
      });
      line.append(name, text);
      grid.append(line);
    }
    return grid;
  }));
}

const prompts = new Map();
for (const select of document.querySelectorAll("select[data-ask]")) {
  const examples = JSON.parse(select.closest(".ask").querySelector("script").textContent);
  const labels = new Set(examples.flatMap(example => example.positions));
  const box = document.querySelector(`[data-prompts="${select.dataset.ask}"]`);
  select.append(new Option("none", ""), ...[...labels].map(label => new Option(label, label)));
  select.addEventListener("change", () => showPrompts(box, examples, select.value));
  prompts.set(select.dataset.ask, datum => {
    const label = datum.label ?? datum.place;
    if (!labels.has(label)) return;
    select.value = label;
    showPrompts(box, examples, label, datum.corruption);
  });
}

// A small picture of a chart in the contents; it takes the colour of the page's text.
function thumbnail(element) {
  const link = document.querySelector(`[data-thumbnail="${element.id}"]`), drawing = element.querySelector("svg.marks");
  if (!link || !drawing) return;
  const copy = drawing.cloneNode(true);
  copy.style.color = getComputedStyle(document.body).color;
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  const picture = link.querySelector("img") || link.insertBefore(document.createElement("img"), link.firstChild);
  if (picture.src) URL.revokeObjectURL(picture.src);
  picture.alt = "";
  picture.src = URL.createObjectURL(new Blob([new XMLSerializer().serializeToString(copy)], {type: "image/svg+xml"}));
}

async function draw(element, spec) {
  try {
    // Vega-Embed shrinks the element it is given to its chart; the outer one keeps the width of the page.
    const frame = element.querySelector("div") || element.appendChild(document.createElement("div"));
    let {view} = await vegaEmbed(frame, fitted(spec, element, 0), options);
    const over = frame.querySelector("svg.marks").getBoundingClientRect().width + MENU_WIDTH - element.clientWidth;
    if (over > 0) ({view} = await vegaEmbed(frame, fitted(spec, element, over), options));
    drawings.set(element.id, view);
    // A group of marks has no description of its own; its marks have.
    for (const group of frame.querySelectorAll("[role=graphics-symbol]:not([aria-label])")) group.removeAttribute("role");
    frame.querySelector("summary")?.setAttribute("aria-label", "Save this chart");
    const show = prompts.get(element.id);
    if (show) view.addEventListener("click", (_, item) => item && item.datum && show(item.datum));
    // The picture is a group of marks with a description each; the frame around it says what it is.
    element.dataset.drawn = "yes";
  } catch (error) {
    element.dataset.drawn = "no";
    element.textContent = "The chart could not be drawn: " + error.message;
  }
}

function drawn(script, id) {
  const element = document.getElementById(id), spec = JSON.parse(script.textContent);
  let width = element.clientWidth, waiting = 0;
  withKeys(element);
  new ResizeObserver(() => {
    if (Math.abs(element.clientWidth - width) < 20) return;
    width = element.clientWidth;
    clearTimeout(waiting);
    waiting = setTimeout(() => draw(element, spec), 100);
  }).observe(element);
  return draw(element, spec);
}

(async () => {
  for (const script of document.querySelectorAll("script[data-chart]")) await drawn(script, script.dataset.chart);
  performance.mark("drawn");
  document.body.dataset.done = "yes";
  const pictures = () => document.querySelectorAll(".chart[data-drawn=yes]").forEach(thumbnail);
  pictures();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", pictures);
})();

// What is on demand is drawn when its details are opened.
const later = new Map([...document.querySelectorAll("script[data-chart-later]")].map(script => [script.dataset.chartLater, script]));
function drawInside(details) {
  for (const [id, script] of later) {
    if (details.contains(script)) {
      later.delete(id);
      drawn(script, id);
    }
  }
}
for (const details of document.querySelectorAll("details.more")) {
  details.addEventListener("toggle", () => details.open && drawInside(details));
}
// On paper all details are open, and words and provenance, which a screen has at the top, stand behind the results.
const about = document.querySelector(".about"), appended = about.querySelectorAll("details");
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details.more:not([open])"), ...appended].filter(details => !details.open);
  for (const details of opened) details.open = true;
  document.getElementById("main").append(...appended);
});
addEventListener("afterprint", () => {
  about.append(...appended);
  for (const details of opened) details.open = false;
});

// Where the reader is, in the contents.
const links = new Map([...document.querySelectorAll("nav a")].map(link => [link.hash.slice(1), link]));
const here = new IntersectionObserver(entries => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    for (const link of links.values()) link.removeAttribute("aria-current");
    const link = links.get(entry.target.id);
    link.setAttribute("aria-current", "location");
    link.scrollIntoView({block: "nearest"});
  }
}, {rootMargin: "-30% 0px -60% 0px"});
for (const id of links.keys()) here.observe(document.getElementById(id));

// Tables: a column's name sorts by it, the button saves what the page holds of the table.
for (const table of document.querySelectorAll("table[data-rows]")) {
  const name = table.dataset.rows, all = JSON.parse(document.querySelector(`script[data-of="${name}"]`).textContent);
  const body = table.tBodies[0], shown = body.rows.length, heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") !== "descending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const order = (a, b) => isNaN(a[column]) || isNaN(b[column]) ? a[column].localeCompare(b[column]) : a[column] - b[column];
    all.sort((a, b) => down ? order(b, a) : order(a, b));
    body.replaceChildren(...all.slice(0, shown).map(row => {
      const line = document.createElement("tr");
      for (const value of row) line.insertCell().textContent = value;
      return line;
    }));
  }));
  document.querySelector(`[data-csv="${name}"]`).addEventListener("click", () => {
    const cell = text => /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    const lines = [heads.map(head => head.textContent), ...all].map(row => row.map(cell).join(","));
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([lines.join("\n") + "\n"], {type: "text/csv"}));
    link.download = name + ".csv";
    link.click();
    URL.revokeObjectURL(link.href);
  });
}

// The claims: by verdict, and sorted by a column.
for (const table of document.querySelectorAll("table.claims")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => row.cells[column].textContent.trim(), number = row => parseFloat(key(row));
    const order = (a, b) => isNaN(number(a)) || isNaN(number(b)) ? key(a).localeCompare(key(b)) : number(a) - number(b);
    body.append(...[...body.rows].sort((a, b) => down ? order(b, a) : order(a, b)));
  }));
}
const filter = document.querySelector("select[data-filter]");
filter?.addEventListener("change", () => {
  for (const row of document.querySelector("table.claims").tBodies[0].rows) {
    row.hidden = filter.value !== "" && row.dataset.verdict !== filter.value;
  }
});
