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
    offer(box, canvas);
    box.dataset.drawn = "true";
  };

  // The data of a figure: every point of every trace, shown or not, and what hovering tells of it, under the same names.
  const told = (trace, layout) => {
    const common = layout.template?.data?.[trace.type ?? "scatter"]?.[0]?.hovertemplate;
    const words = [trace.hovertemplate ?? common ?? ""].flat()[0].replace(/<[^>]*>/g, ", ");
    return [...words.matchAll(/([^,:=%{}]*)[ :=]*%\{customdata\[(\d+)\]/g)].map(([, name, at]) => [name.trim(), +at]);
  };
  const NUMBERS = { f8: Float64Array, f4: Float32Array, i4: Int32Array, i2: Int16Array, i1: Int8Array, u4: Uint32Array, u2: Uint16Array, u1: Uint8Array };
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer;
  const list = (values) => Array.from(values?.bdata ? new NUMBERS[values.dtype](bytes(values.bdata)) : (values ?? []));
  // Names that the figure gives go before those of axes and hover; what is called null is left out.
  const titled = (trace, layout, side) =>
    layout[`${side}axis${(trace[`${side}axis`] ?? "").slice(1)}`]?.title?.text || layout[`${side}axis`]?.title?.text || side;
  const points = (trace, layout) => {
    // A line from mark to mark, or a text beside a bar: no record of its own.
    if (trace.hoverinfo === "skip" && trace.showlegend === false) return [];
    const called = layout.meta?.columns ?? {};
    const [across, up] = ["x", "y"].map((side) => (side in called ? called[side] : titled(trace, layout, side)));
    const kept = (...pairs) => Object.fromEntries(pairs.filter(([name]) => name));
    // A mark that begins with a comma is a piece of what hovering tells.
    const marks = [trace.meta ?? []].flat().filter((mark) => mark !== null && !/^(,|$)/.test(mark));
    const own = { trace: trace.name ?? "", choices: marks.join("; ") };
    const names = called.hover?.map((name, at) => [name, at]) ?? told(trace, layout);
    const more = (cell) => Object.fromEntries(names.map(([name, at]) => [name, [cell ?? []].flat()[at]]));
    if (trace.type === "sankey") {
      const { source, target, value } = trace.link;
      const ends = (i) => ({ from: trace.node.label[source[i]], to: trace.node.label[target[i]] });
      return value.map((mass, i) => ({ ...own, ...ends(i), mass, ...more(trace.link.customdata?.[i]) }));
    }
    const { z, customdata = [], text } = trace;
    const [x, y] = [list(trace.x), list(trace.y)];
    const each = (i, j) => ({ ...own, ...kept([across, x[j] ?? j], [up, y[i] ?? i]) });
    if (z) {
      const shown = "z" in called ? called.z : "value";
      const cell = (value, i, j) => ({ ...each(i, j), ...kept([shown, value]), ...more(customdata[i]?.[j]) });
      const known = (value, i, j) => (value === null ? [] : [cell(value, i, j)]);
      return list(z).flatMap((line, i) => list(line).flatMap((value, j) => known(value, i, j)));
    }
    const point = (i) => ({ ...each(i, i), ...kept([called.text, text?.[i]]), ...more(customdata[i]) });
    return [...(y.length ? y : x).keys()].filter((i) => x[i] !== null && y[i] !== null).map(point);
  };
  const quoted = (value) => {
    const text = `${value ?? ""}`.replace(/<[^>]*>/g, " ").trim().replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&amp;/g, "&");
    return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const table = ({ data, layout }) => {
    const rows = data.flatMap((trace) => points(trace, layout));
    const names = [...new Set(rows.flatMap(Object.keys))];
    return [names, ...rows.map((row) => names.map((name) => row[name]))].map((row) => row.map(quoted).join(",")).join("\n");
  };
  const offer = (box, canvas) => {
    const button = document.createElement("button");
    Object.assign(button, { type: "button", className: "chassis-data", textContent: "Data of this figure (CSV)" });
    button.addEventListener("click", () => {
      const file = document.createElement("a");
      file.href = URL.createObjectURL(new Blob([`${table(canvas)}\n`], { type: "text/csv" }));
      file.download = `${location.pathname.split("/").pop().replace(/\.html$/, "")}.csv`;
      file.click();
      setTimeout(() => URL.revokeObjectURL(file.href), 1000);
    });
    box.append(button);
  };

  // One figure that fails must not take the others with it: each is a promise, and a lost one is a page error.
  document.querySelectorAll(".chassis-plot").forEach(draw);
})();
