"use strict";
// Draws the charts of a page. The library that draws them is loaded once, from beside this file, and only where there is a chart.
const SMALLEST = 720, charts = document.querySelectorAll(".chart");
if (charts.length) {
  const library = document.createElement("script");
  library.src = new URL("vega.js", document.currentScript.src);
  library.addEventListener("load", () => charts.forEach(draw));
  document.head.append(library);
}

async function draw(chart) {
  const spec = JSON.parse(chart.querySelector("script").textContent), frame = chart.appendChild(document.createElement("div"));
  try {
    await vegaEmbed(frame, spec, {renderer: "svg", actions: false});
    // It shrinks with the page as long as its words can be read; the page scrolls it then.
    for (const drawing of frame.querySelectorAll("svg.marks")) {
      drawing.style.minWidth = Math.min(SMALLEST, drawing.width.baseVal.value) + "px";
    }
    chart.dataset.drawn = "yes";
  } catch (error) {
    chart.dataset.drawn = "no";
    frame.textContent = "The chart could not be drawn: " + error.message;
  }
}
