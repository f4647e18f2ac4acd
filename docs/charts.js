"use strict";
// Draws the charts of a page. The library that draws them is loaded once, from beside this file, and only where there is a chart.
const charts = document.querySelectorAll(".chart");
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
    chart.dataset.drawn = "yes";
  } catch (error) {
    chart.dataset.drawn = "no";
    frame.textContent = "The chart could not be drawn: " + error.message;
  }
}
