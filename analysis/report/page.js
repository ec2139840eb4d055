// Draws every <figure data-spec> from its JSON. No library: SVG, a tooltip, zoom on the time axis, sortable tables.
"use strict";
const NS = "http://www.w3.org/2000/svg", tip = document.getElementById("tip");
const node = (name, attrs, parent, text) => {
  const e = document.createElementNS(NS, name);
  for (const k in attrs) e.setAttribute(k, attrs[k]);
  if (text !== undefined) e.textContent = text;
  if (parent) parent.appendChild(e);
  return e;
};
// A colour by its name for a light ground; page.css says what takes its place on a dark one.
const paintOf = color => `var(--c-${color.slice(1)}, ${color})`;
const luminance = rgb => rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((a, v, i) => a + v * [0.2126, 0.7152, 0.0722][i], 0);
// black or white, whichever can be read on the shape
const writeOn = (shape, text) => {
  const rgb = getComputedStyle(shape).fill.match(/[0-9.]+/g).slice(0, 3).map(Number);
  text.style.fill = luminance(rgb) > 0.179 ? "#000" : "#fff";
};
const onShapes = [];
const hover = (e, text) => {
  e.addEventListener("mousemove", ev => {
    tip.textContent = typeof text === "function" ? text(ev) : text;
    tip.style.display = tip.textContent ? "block" : "none";
    const w = tip.offsetWidth, x = ev.clientX + 14;
    tip.style.left = (x + w > innerWidth ? ev.clientX - w - 10 : x) + "px";
    tip.style.top = Math.min(ev.clientY + 14, innerHeight - tip.offsetHeight - 4) + "px";
  });
  e.addEventListener("mouseleave", () => { tip.style.display = "none"; });
};
const num = v => {
  if (v === 0) return "0";
  const a = Math.abs(v);
  if (a >= 1e6 || a < 1e-3) return v.toExponential(2).replace("e+", "e");
  return a >= 1000 ? Math.round(v).toLocaleString("en") : String(+v.toPrecision(4));
};
const ticks = (lo, hi, n) => {
  const span = hi - lo || 1, raw = span / n, mag = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(s => s * mag).find(s => s >= raw), found = [];
  for (let v = Math.ceil(lo / step) * step; v <= hi + step * 1e-6; v += step) found.push(+v.toFixed(12));
  return found;
};
// the end of a long text: of a path it says more than the beginning
const fit = (e, width) => {
  const text = e.textContent;
  for (let n = text.length; n > 1 && e.getComputedTextLength() > width;) {
    n = Math.min(n - 1, Math.floor(n * width / e.getComputedTextLength()));
    e.textContent = "…" + text.slice(-n);
  }
};
const legend = (fig, names) => {
  const box = document.createElement("div");
  box.className = "legend";
  for (const [name, color] of names) {
    const item = document.createElement("span"), dot = document.createElement("i");
    dot.style.background = paintOf(color);
    item.append(dot, name);
    box.append(item);
  }
  fig.insertBefore(box, fig.querySelector("figcaption"));
};
const canvas = (fig, w, h) => {
  const svg = node("svg", { viewBox: `0 0 ${w} ${h}`, role: "img", "aria-label": fig.dataset.label });
  fig.insertBefore(svg, fig.querySelector("figcaption"));
  return svg;
};
const xaxis = (svg, x0, x1, y, lo, hi, unit, n) => {
  node("line", { x1: x0, x2: x1, y1: y, y2: y, class: "axis" }, svg);
  for (const t of ticks(lo, hi, n || 8)) {
    const x = x0 + (t - lo) / (hi - lo || 1) * (x1 - x0);
    node("line", { x1: x, x2: x, y1: y, y2: y + 4, class: "axis" }, svg);
    node("text", { x, y: y + 17, "text-anchor": "middle" }, svg, num(t));
  }
  node("text", { x: x1, y: y + 31, "text-anchor": "end", class: "soft" }, svg, unit);
};

const draw = {
  // rows: [{label, parts: [[name, from, length]]}]: stacked bars and Gantt charts are the same thing
  rows(fig, s) {
    const W = fig.clientWidth || 1180, left = Math.min(s.left || 110, W * 0.42), right = 20, bar = s.rows.length > 40 ? 10 : 22;
    const H = s.rows.length * (bar + 6) + 44, end = Math.max(...s.rows.flatMap(r => r.parts.map(p => p[1] + p[2])), 1e-9);
    legend(fig, Object.entries(s.colors));
    const svg = canvas(fig, W, H);
    s.rows.forEach((row, i) => {
      const y = i * (bar + 6) + 4;
      fit(node("text", { x: left - 8, y: y + bar / 2 + 4, "text-anchor": "end" }, svg, row.label), left - 12);
      const whole = row.parts.reduce((a, p) => a + p[2], 0);
      for (const [name, from, length] of row.parts) {
        const x = left + from / end * (W - left - right), w = length / end * (W - left - right);
        const r = node("rect", { x, y, width: Math.max(w, 0.4), height: bar, style: `fill:${paintOf(s.colors[name])}` }, svg);
        hover(r, `${row.label}\n${name}: ${num(length)} ${s.unit} (${(100 * length / whole).toFixed(1)}%)` + (s.gantt ? `\nfrom ${num(from)} ${s.unit}` : ""));
        const text = s.gantt ? name : (100 * length / whole).toFixed(0) + "%";
        if (w > text.length * 7 + 8 && bar > 14 && (s.gantt || row.parts.length > 1)) {
          const t = node("text", { x: x + w / 2, y: y + bar / 2 + 4, "text-anchor": "middle", style: "pointer-events:none" }, svg, text);
          onShapes.push([r, t]);
          writeOn(r, t);
        }
      }
    });
    const small = s.unit === "s" && end < 0.1;
    xaxis(svg, left, W - right, H - 38, 0, small ? 1000 * end : end, small ? "ms" : s.unit);
  },
  // panels over one time axis: [{label, unit, kind: stack|line|dots, series: [{name, color, x, y, tips}]}]
  time(fig, s) {
    const W = fig.clientWidth || 1180, left = 74, right = 20, gap = 26;
    const heights = s.panels.map(p => p.height || 90), keys = s.panels.map(p => p.series.length > 2 && W < 720 ? 16 : 0);
    const H = [...heights, ...keys].reduce((a, h) => a + h, gap * heights.length + 40);
    const all = s.panels.flatMap(p => p.series.flatMap(q => [q.x[0], q.x[q.x.length - 1]])).filter(v => v !== undefined);
    const full = [Math.min(...all), Math.max(...all)];
    if (s.panels[0].kind === "dots") { const pad = (full[1] - full[0]) * 0.01 || 1; full[0] -= pad; full[1] += pad; }
    let svg = null, view = full.slice();
    const paint = () => {
      if (svg) svg.remove();
      svg = canvas(fig, W, H);
      const id = "c" + Math.random().toString(36).slice(2);
      const clip = node("clipPath", { id }, node("defs", {}, svg));
      node("rect", { x: left, y: 0, width: W - left - right, height: H }, clip);
      const X = v => left + (v - view[0]) / (view[1] - view[0] || 1) * (W - left - right);
      let top = 16;
      s.panels.forEach((p, k) => {
        top += keys[k];
        const h = heights[k], seen = q => q.x.map((v, i) => i).filter(i => q.x[i] >= view[0] - (p.kind === "stack" ? q.width || 0 : 0) && q.x[i] <= view[1]);
        const values = p.kind === "stack" ? [0, 1] : p.series.flatMap(q => seen(q).map(i => q.y[i])).filter(v => v !== null);
        let lo = p.zero === false ? Math.min(...values) : 0, hi = Math.max(...values, lo);
        if (!isFinite(hi)) [lo, hi] = [0, 1];
        if (hi === lo) hi += p.zero === false ? Math.abs(lo) * 0.02 || 1 : 1;
        const pad = p.kind === "stack" ? 0 : (hi - lo) * 0.08;
        hi += pad;
        if (p.zero === false) lo -= pad;
        const Y = v => top + h - (v - lo) / (hi - lo) * h;
        const label = node("text", { x: left, y: top - 5 - keys[k] }, svg, p.label);
        let key = keys[k] ? left : left + label.getComputedTextLength() + 18;
        for (const q of p.series.length > 1 ? p.series : []) {  // each panel its own legend, where narrow in a line of its own
          node("rect", { x: key, y: top - 15, width: 11, height: 11, rx: 2, style: `fill:${paintOf(q.color)}` }, svg);
          key += node("text", { x: key + 16, y: top - 5 }, svg, q.name).getComputedTextLength() + 32;
        }
        for (const t of ticks(lo, hi, p.kind === "stack" ? 2 : 3)) {
          node("line", { x1: left, x2: W - right, y1: Y(t), y2: Y(t), class: "grid" }, svg);
          node("text", { x: left - 6, y: Y(t) + 4, "text-anchor": "end", class: "soft" }, svg, p.kind === "stack" ? 100 * t + "%" : num(t));
        }
        const g = node("g", { "clip-path": `url(#${id})` }, svg);
        for (const [a, b] of s.gaps || []) {
          node("rect", { x: X(a), y: top, width: Math.max(0, X(b) - X(a)), height: h, class: "pause" }, g);
          if (X(b) - X(a) > 90) node("text", { x: (X(a) + X(b)) / 2, y: top + h / 2 + 4, "text-anchor": "middle", class: "soft" }, g, "not running");
        }
        const apart = (x, y) => (s.gaps || []).some(([a, b]) => x < (a + b) / 2 && y > (a + b) / 2);
        if (p.kind === "stack") {
          const base = p.series[0].x.map(() => 0), w = p.series[0].width;
          for (const q of p.series) {
            let d = "";
            q.y.forEach((v, i) => {
              if (v > 0) d += `M${X(q.x[i]).toFixed(1)} ${Y(base[i]).toFixed(1)}H${X(q.x[i] + w).toFixed(1)}V${Y(base[i] + v).toFixed(1)}H${X(q.x[i]).toFixed(1)}Z`;
              base[i] += v;
            });
            node("path", { d, style: `fill:${paintOf(q.color)}` }, g);
          }
        } else if (p.kind === "dots") {
          for (const q of p.series) for (const i of seen(q)) {
            const c = node("circle", { cx: X(q.x[i]), cy: Y(q.y[i]), r: q.r || 3, style: `fill:${paintOf(q.color)}`, "fill-opacity": 0.75 }, g);
            hover(c, q.tips ? q.tips[i] : `${q.name}: ${num(q.y[i])} ${p.unit}\nat ${num(q.x[i])} ${s.unit}`);
          }
        } else for (const q of p.series) {
          let d = "";
          q.x.forEach((v, i) => {
            if (q.y[i] === null) return;
            const y = Y(q.y[i]).toFixed(1), go = d && !apart(q.x[i - 1], v) ? "L" : "M";
            d += q.width ? `${go}${X(v).toFixed(1)} ${y}H${X(v + q.width).toFixed(1)}` : `${go}${X(v).toFixed(1)} ${y}`;
          });
          node("path", { d, fill: "none", style: `stroke:${paintOf(q.color)}`, "stroke-width": 1.6 }, g);
          if (!q.width && q.x.length < 80) q.x.forEach((v, i) => node("circle", { cx: X(v), cy: Y(q.y[i]), r: 2.4, style: `fill:${paintOf(q.color)}` }, g));
        }
        node("line", { x1: left, x2: W - right, y1: top + h, y2: top + h, class: "axis" }, svg);
        if (p.kind !== "dots") {
          const pad = node("rect", { x: left, y: top, width: W - left - right, height: h, fill: "transparent" }, svg);
          hover(pad, ev => {
            const box = svg.getBoundingClientRect(), v = view[0] + ((ev.clientX - box.left) / box.width * W - left) / (W - left - right) * (view[1] - view[0]);
            if ((s.gaps || []).some(([a, b]) => v > a && v < b)) return `${num(v)} ${s.unit}\nnot running`;
            const lines = p.series.map(q => {
              let i = q.x.findIndex(x => x > v) - 1;
              if (i === -2) i = q.x.length - 1;
              if (i < 0) return "";
              return `${q.name}: ${p.kind === "stack" ? (100 * q.y[i]).toFixed(1) + "%" : num(q.y[i]) + " " + p.unit}`;
            });
            return `${num(v)} ${s.unit}\n` + lines.filter(Boolean).join("\n");
          });
        }
        top += h + gap;
      });
      xaxis(svg, left, W - right, top - gap, view[0], view[1], s.unit, 10);
      let from = null, mark = null;
      const at = ev => { const b = svg.getBoundingClientRect(); return Math.min(Math.max((ev.clientX - b.left) / b.width * W, left), W - right); };
      const back = x => view[0] + (x - left) / (W - left - right) * (view[1] - view[0]);
      svg.addEventListener("mousedown", ev => { from = at(ev); mark = node("rect", { x: from, y: 0, width: 0, height: top - gap, class: "mark" }, svg); ev.preventDefault(); });
      svg.addEventListener("mousemove", ev => { if (mark) { const x = at(ev); mark.setAttribute("x", Math.min(x, from)); mark.setAttribute("width", Math.abs(x - from)); } });
      svg.addEventListener("mouseup", ev => {
        if (!mark) return;
        const x = at(ev), span = [back(Math.min(x, from)), back(Math.max(x, from))];
        mark.remove(); mark = null;
        if (Math.abs(x - from) > 5) { view = span; paint(); }
      });
      svg.addEventListener("dblclick", () => { view = full.slice(); paint(); });
    };
    paint();
  },
  // columns: labels and series of equal length, grouped
  columns(fig, s) {
    const W = fig.clientWidth || 1180, left = 74, right = 16, plot = 170, head = 24, H = head + plot + 60;
    if (s.series.length > 1) legend(fig, s.series.map(q => [q.name, q.color]));
    const svg = canvas(fig, W, H), hi = Math.max(...s.series.flatMap(q => q.y), 1e-9), slot = (W - left - right) / s.labels.length;
    const log = s.log, Y = v => head + plot - (log ? Math.log10(1 + v) / Math.log10(1 + hi) : v / hi) * plot;
    const marks = log ? [0, ...Array.from({ length: Math.ceil(Math.log10(1 + hi)) + 1 }, (_, i) => 10 ** i).filter(v => v <= hi)] : ticks(0, hi, 4);
    for (const t of marks) {
      node("line", { x1: left, x2: W - right, y1: Y(t), y2: Y(t), class: "grid" }, svg);
      node("text", { x: left - 6, y: Y(t) + 4, "text-anchor": "end", class: "soft" }, svg, num(t));
    }
    node("line", { x1: left, x2: W - right, y1: head + plot, y2: head + plot, class: "axis" }, svg);
    const every = Math.ceil(Math.max(...s.labels.map(l => l.length)) * 7.2 / slot);
    s.labels.forEach((label, i) => {
      const w = Math.min(60, slot * 0.84 / s.series.length);
      s.series.forEach((q, k) => {
        const x = left + i * slot + slot / 2 + (k - s.series.length / 2) * w, y = Y(q.y[i]);
        const r = node("rect", { x, y, width: Math.max(1, w - 1), height: Math.max(0, head + plot - y), style: `fill:${paintOf(q.color)}` }, svg);
        hover(r, `${label}\n${q.name}: ${num(q.y[i])} ${s.yunit || ""}` + (q.tips ? `\n${q.tips[i]}` : ""));
      });
      if (i % every === 0) node("text", { x: left + i * slot + slot / 2, y: head + plot + 17, "text-anchor": "middle" }, svg, label);
    });
    node("text", { x: W - right, y: head + plot + 36, "text-anchor": "end", class: "soft" }, svg, s.xunit || "");
    node("text", { x: 4, y: 12, class: "soft" }, svg, (s.yunit || "") + (log ? ", log scale" : ""));
  },
  // ranks x time; cells of about the same value are one path, since there may be tens of thousands
  heat(fig, s) {
    const W = fig.clientWidth || 1180, left = s.left, right = 20, cell = Math.max(2.5, Math.min(22, 400 / s.rows.length));
    const H = s.rows.length * cell + 44, n = s.values[0].length, w = (W - left - right) / n, SHADES = 24;
    const hi = s.values.reduce((a, row) => Math.max(a, ...row), 1e-9), shades = Array.from({ length: SHADES + 1 }, () => []);
    const svg = canvas(fig, W, H), every = Math.ceil(14 / cell), height = cell > 4 ? cell - 0.6 : cell;
    s.rows.forEach((label, i) => {
      if (i % every === 0) fit(node("text", { x: left - 8, y: Math.max(11, i * cell + cell / 2 + 4), "text-anchor": "end" }, svg, label), left - 10);
      node("rect", { x: left, y: i * cell, width: W - left - right, height, class: "cold" }, svg);
      s.values[i].forEach((v, k) => {
        if (v > 0) shades[Math.max(1, Math.round(SHADES * Math.sqrt(v / hi)))].push(`M${(left + k * w).toFixed(1)} ${(i * cell).toFixed(1)}h${(w + 0.4).toFixed(1)}v${height}h${(-w - 0.4).toFixed(1)}z`);
      });
    });
    shades.forEach((cells, shade) => { if (cells.length) node("path", { d: cells.join(""), class: "heat", "fill-opacity": shade / SHADES }, svg); });
    const pad = node("rect", { x: left, y: 0, width: W - left - right, height: s.rows.length * cell, fill: "transparent" }, svg);
    hover(pad, ev => {
      const b = svg.getBoundingClientRect(), k = Math.floor(((ev.clientX - b.left) / b.width * W - left) / w);
      const i = Math.floor((ev.clientY - b.top) / b.height * H / cell);
      return s.values[i]?.[k] === undefined ? "" : `${s.rows[i]} at ${num(s.from + k * s.width)} s\n${num(s.values[i][k])} ${s.unit}`;
    });
    xaxis(svg, left, W - right, H - 38, s.from, s.from + n * s.width, "s");
  },
};
for (const fig of document.querySelectorAll("figure[data-spec]")) {
  const spec = JSON.parse(document.getElementById(fig.dataset.spec).textContent);
  fig.dataset.label = spec.label || "";
  draw[spec.type](fig, spec);
}
const recolour = () => { for (const [shape, text] of onShapes) writeOn(shape, text); };
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
matchMedia("print").addEventListener("change", recolour);
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const th = button.closest("th"), body = th.closest("table").tBodies[0], i = th.cellIndex;
  const up = th.getAttribute("aria-sort") !== "ascending";
  for (const other of th.parentNode.cells) other.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = tr => { const v = tr.cells[i].dataset.v; return v === undefined ? tr.cells[i].textContent : v === "" ? -Infinity : +v; };
  const rows = [...body.rows].sort((a, b) => { const x = key(a), y = key(b); return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1); });
  body.append(...rows);
});
