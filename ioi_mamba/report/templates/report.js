"use strict";
// Draws every chart of the page; a chart of panels gets as many columns as fit, again whenever that number changes.
const options = {renderer: "svg", actions: {export: true, source: false, compiled: false, editor: false}};

const AXIS_WIDTH = 90;

// Pixels of each panel of a chart of panels that are equally wide; undefined of any other chart.
function panelWidth(spec) {
  const panels = spec.facet ? [spec.spec] : spec.concat || [];
  return panels.length && panels.every(panel => panel.width === panels[0].width) ? panels[0].width : undefined;
}

function columnsThatFit(spec, element) {
  return Math.max(1, Math.floor(element.clientWidth / (panelWidth(spec) + AXIS_WIDTH)));
}

// The prompts of a section with the token at one position marked; corruption: only those of this one, if given.
function showPrompts(box, examples, label, corruption) {
  box.querySelector("select").value = label;
  const shown = examples.filter(e => e.positions.includes(label) && (corruption === undefined || e.corruption === corruption));
  box.querySelector("[role=status]").replaceChildren(...shown.map(example => {
    const paragraph = document.createElement("p");
    for (const side of ["clean", "corrupted"]) {
      paragraph.append(side + ":\t");
      example[side].forEach((token, index) => {
        const marked = example.positions[index] === label;
        const place = marked ? document.createElement("mark") : document.createElement("span");
        place.textContent = token;
        paragraph.append(place);
      });
      paragraph.append("\n");
    }
    return paragraph;
  }));
}

const prompts = new Map();
for (const box of document.querySelectorAll("[data-prompts]")) {
  const examples = JSON.parse(box.querySelector("script").textContent);
  const select = box.querySelector("select");
  const labels = new Set(examples.flatMap(example => example.positions));
  select.append(new Option("none", ""), ...[...labels].map(label => new Option(label, label)));
  select.addEventListener("change", () => showPrompts(box, examples, select.value));
  prompts.set(box.dataset.prompts, (datum) => {
    const label = datum.label ?? datum.place;
    if (labels.has(label)) showPrompts(box, examples, label, datum.corruption);
  });
}

async function draw(element, spec) {
  try {
    // Vega-Embed shrinks the element it is given to its chart; the outer one keeps the width of the page.
    const frame = element.querySelector("div") || element.appendChild(document.createElement("div"));
    const {view} = await vegaEmbed(frame, spec, options);
    const show = prompts.get(element.id);
    if (show) view.addEventListener("click", (_, item) => item && item.datum && show(item.datum));
    element.dataset.drawn = "yes";
  } catch (error) {
    element.dataset.drawn = "no";
    element.textContent = "The chart could not be drawn: " + error.message;
  }
}

for (const script of document.querySelectorAll("script[data-chart]")) {
  const element = document.getElementById(script.dataset.chart);
  const spec = JSON.parse(script.textContent);
  if (spec.columns && panelWidth(spec)) {
    spec.columns = columnsThatFit(spec, element);
    new ResizeObserver(() => {
      const columns = columnsThatFit(spec, element);
      if (columns !== spec.columns) {
        spec.columns = columns;
        draw(element, spec);
      }
    }).observe(element);
  }
  draw(element, spec);
}
