// Draws every figure of a page and keeps its ink in step with the theme. Figures bring their own layout.
(() => {
  "use strict";
  const INK = {
    light: { text: "#3b4248", panel: "#ffffff", line: "#aab2ba" },
    dark: { text: "#ccd2d8", panel: "#22272e", line: "#5b646e" },
  };
  const ink = (layout) => {
    const { text, panel, line } = INK[document.documentElement.dataset.theme] ?? INK.light;
    return {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { ...layout.font, color: text },
      hoverlabel: { ...layout.hoverlabel, bgcolor: panel, bordercolor: line, font: { color: text } },
    };
  };

  const draw = async (box) => {
    const canvas = box.querySelector(".chassis-canvas");
    const { data, layout, frames } = JSON.parse(box.querySelector("script").textContent);
    delete layout.width; // the page decides
    Object.assign(layout, ink(layout), { autosize: true, height: parseInt(box.style.minHeight, 10) });
    await Plotly.newPlot(canvas, { data, layout, frames, config: { responsive: true, displaylogo: false } });
    // A dropdown says of every trace whether it is shown: what the reader hid through the legend is hidden again.
    let hidden = new Set();
    canvas.on("plotly_restyle", () => {
      hidden = new Set(canvas.data.filter((trace) => trace.visible === "legendonly").map((trace) => trace.legendgroup));
    });
    canvas.on("plotly_update", () => {
      const back = canvas.data.map((trace) => trace.visible === true && hidden.has(trace.legendgroup));
      const numbers = [...back.keys()].filter((number) => back[number]);
      if (numbers.length) Plotly.restyle(canvas, { visible: "legendonly" }, numbers);
    });
    new MutationObserver(() => Plotly.relayout(canvas, ink(canvas.layout))).observe(document.documentElement, {
      attributeFilter: ["data-theme"],
    });
    box.dataset.drawn = "true";
  };

  // One figure that fails must not take the others with it: each is a promise, and a lost one is a page error.
  document.querySelectorAll(".chassis-plot").forEach(draw);
})();
