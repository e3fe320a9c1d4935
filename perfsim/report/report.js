"use strict";
// Reads the values under the pointer out of a figure's data-plot; the figures are complete without it.
(() => {
  const scales = {
    s: [[7200, 3600, "h"], [180, 60, "min"], [1, 1, "s"], [1e-3, 1e-3, "ms"], [1e-6, 1e-6, "µs"], [0, 1e-9, "ns"]],
  };
  const digits = (value) => {
    if (value === 0) return "0";
    const exponent = Number(value.toExponential(2).split("e")[1]);
    const places = Math.max(0, 2 - exponent);
    return value.toLocaleString("en-US", { minimumFractionDigits: places, maximumFractionDigits: places });
  };
  const human = (value, unit) => {
    if (value === 0 && unit === "s") return "0 s";
    if (unit === "fraction") return `${(100 * value).toFixed(1)}%`;
    const scale = (scales[unit] || [[0, 1, unit]]).find((row) => Math.abs(value) >= row[0]);
    return `${digits(value / scale[1])} ${scale[2]}`;
  };
  const tip = document.createElement("div");
  tip.id = "tip";
  document.body.append(tip);

  const nearest = (plot, x) => {
    const count = plot.rows[0].y.length;
    if (!plot.px) return Math.min(count - 1, Math.max(0, Math.floor((x - plot.px0) / plot.pxw)));
    let best = 0;
    for (let i = 1; i < count; i++) if (Math.abs(plot.px[i] - x) < Math.abs(plot.px[best] - x)) best = i;
    return best;
  };

  document.querySelectorAll("svg.plot").forEach((svg) => {
    const plot = JSON.parse(svg.dataset.plot);
    const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
    cursor.setAttribute("class", "cursor");
    cursor.setAttribute("y1", plot.top);
    cursor.setAttribute("y2", plot.bottom);
    const hide = () => {
      tip.style.display = "none";
      cursor.remove();
    };
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) * svg.viewBox.baseVal.width) / box.width;
      if (x < plot.left || x > plot.right) return hide();
      const i = nearest(plot, x);
      const at = plot.px ? plot.px[i] : Math.min(plot.right, plot.px0 + (i + 0.5) * plot.pxw);
      cursor.setAttribute("x1", at);
      cursor.setAttribute("x2", at);
      svg.append(cursor);
      const head = plot.px ? `${Number((100 * plot.p[i]).toFixed(1))}% of samples within` : `at ${human(i * plot.dt, "s")}`;
      tip.textContent = [head, ...plot.rows.map((row) => `${row.name}: ${human(row.y[i], row.unit)}`)].join("\n");
      tip.style.display = "block";
      const room = document.documentElement.clientWidth - event.clientX > tip.offsetWidth + 30;
      tip.style.left = `${event.pageX + (room ? 16 : -16 - tip.offsetWidth)}px`;
      tip.style.top = `${event.pageY + 14}px`;
    });
  });
})();
