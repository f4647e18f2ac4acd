"use strict";
// Draws every chart of the page; a chart of panels gets as many columns as fit, again whenever that number changes.
const options = {renderer: "svg", actions: {export: true, source: false, compiled: false, editor: false}};

const AXIS_WIDTH = 90;

function columnsThatFit(spec, element) {
  return Math.max(1, Math.floor(element.clientWidth / (spec.spec.width + AXIS_WIDTH)));
}

async function draw(element, spec) {
  try {
    // Vega-Embed shrinks the element it is given to its chart; the outer one keeps the width of the page.
    const frame = element.querySelector("div") || element.appendChild(document.createElement("div"));
    await vegaEmbed(frame, spec, options);
    element.dataset.drawn = "yes";
  } catch (error) {
    element.dataset.drawn = "no";
    element.textContent = "The chart could not be drawn: " + error.message;
  }
}

for (const script of document.querySelectorAll("script[data-chart]")) {
  const element = document.getElementById(script.dataset.chart);
  const spec = JSON.parse(script.textContent);
  if (spec.facet && spec.columns && spec.spec.width) {
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
