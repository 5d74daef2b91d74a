// Draws every figure.chart from the JSON beside it. Nothing is fetched, nothing is kept.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const EDGE = { left: 52, right: 10, top: 8, bottom: 34 };  // px around the plot
const HEIGHT = 230;  // px

function make(parent, name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;  // text, never markup
  return parent.appendChild(node);
}

function short(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

function linearTicks(low, high, count) {
  const raw = (high - low) / count, unit = 10 ** Math.floor(Math.log10(raw));
  const step = unit * [1, 2, 5, 10].find((factor) => factor * unit >= raw * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) ticks.push(i * step);
  return ticks;
}

function logTicks(low, high) {
  const first = Math.ceil(low - 1e-9), last = Math.floor(high + 1e-9);
  if (last < first) return linearTicks(10 ** low, 10 ** high, 4).filter((value) => value > 0);
  const step = Math.ceil((last - first + 1) / 6), ticks = [];
  for (let power = first; power <= last; power += step) ticks.push(10 ** power);
  return ticks;
}

function smoothed(values, weight) {  // exponential moving average, its start corrected as Adam's moments are
  let mean = 0, share = 0;
  return values.map((value) => {
    mean = weight * mean + (1 - weight) * value;
    share = weight * share + 1 - weight;
    return mean / share;
  });
}

class Chart {
  constructor(figure) {
    this.figure = figure;
    this.plot = figure.querySelector(".plot");
    this.outputs = [...figure.querySelectorAll("output")];
    Object.assign(this, JSON.parse(figure.querySelector("script").textContent));
    this.box = figure.querySelector("input");
    this.steps = [...new Set(this.series.flatMap((one) => one.x))].sort((a, b) => a - b);
    this.at = null;  // index of the step that is pointed at
    this.box.addEventListener("change", () => this.draw());
    this.plot.addEventListener("pointermove", (event) => this.point(this.nearest(event)));
    this.plot.addEventListener("pointerleave", () => this.point(null));
    this.plot.addEventListener("keydown", (event) => this.key(event));
    this.plot.addEventListener("blur", () => this.point(null));
  }

  draw() {
    this.width = Math.max(240, this.plot.clientWidth);
    const log = this.box.checked, weight = Number(document.getElementById("smoothing")?.value || 0);
    this.shown = this.series.map((one) => {
      const y = weight ? smoothed(one.y, weight) : one.y;
      return one.x.map((x, i) => [x, log && !(y[i] > 0) ? null : y[i]]).filter(([, value]) => value !== null);
    });
    const values = this.shown.flat().map(([, value]) => (log ? Math.log10(value) : value));
    let low = values.reduce((a, b) => Math.min(a, b), Infinity), high = values.reduce((a, b) => Math.max(a, b), -Infinity);
    if (!values.length) [low, high] = [0, 1];
    if (!log && this.least !== null) low = Math.min(low, this.least);
    if (high - low < 1e-12 * Math.max(1, Math.abs(high))) [low, high] = [low - 0.5, high + 0.5];
    const [first, last] = [this.steps[0] ?? 0, this.steps[this.steps.length - 1] ?? 1];
    const across = this.width - EDGE.left - EDGE.right, down = HEIGHT - EDGE.top - EDGE.bottom;
    this.x = (step) => EDGE.left + (last > first ? (step - first) / (last - first) : 0.5) * across;
    this.y = (value) => EDGE.top + (1 - ((log ? Math.log10(value) : value) - low) / (high - low)) * down;
    this.plot.replaceChildren();
    this.svg = make(this.plot, "svg", { viewBox: `0 0 ${this.width} ${HEIGHT}`, width: this.width, height: HEIGHT, "aria-hidden": true });
    for (const value of log ? logTicks(low, high) : linearTicks(low, high, 4)) {
      make(this.svg, "line", { x1: EDGE.left, x2: this.width - EDGE.right, y1: this.y(value), y2: this.y(value), class: "grid" });
      make(this.svg, "text", { x: EDGE.left - 5, y: this.y(value) + 4, "text-anchor": "end" }, short(value));
    }
    if (last > first) for (const step of linearTicks(first, last, Math.max(2, Math.floor(across / 90))))
      make(this.svg, "text", { x: this.x(step), y: HEIGHT - EDGE.bottom + 16, "text-anchor": "middle" }, short(step));
    make(this.svg, "text", { x: EDGE.left + across / 2, y: HEIGHT - 3, "text-anchor": "middle" }, this.xlabel);
    this.marks(down);
    this.shown.forEach((points, i) => {
      const path = points.map(([x, value]) => `${this.x(x).toFixed(1)},${this.y(value).toFixed(1)}`).join(" ");
      if (points.length === 1) make(this.svg, "circle", { cx: this.x(points[0][0]), cy: this.y(points[0][1]), r: 3, class: `s${this.series[i].color}` });
      else make(this.svg, "polyline", { points: path, class: `s${this.series[i].color}`, "stroke-dasharray": this.series[i].dash });
    });
    this.cursor = make(this.svg, "line", { y1: EDGE.top, y2: EDGE.top + down, class: "cursor", visibility: "hidden" });
    this.point(this.at);
  }

  marks(down) {
    const first = this.steps[0], last = this.steps[this.steps.length - 1];
    for (const { from, to, text, kind } of this.spans) {
      if (to < first || from > last || first === last) continue;
      const left = this.x(Math.max(from, first)), right = this.x(Math.min(to, last));
      const rect = make(this.svg, "rect", { x: left - 1, y: EDGE.top, width: Math.max(2, right - left + 2), height: down, class: kind });
      make(rect, "title", {}, text);
    }
  }

  nearest(event) {
    const box = this.svg.getBoundingClientRect(), at = ((event.clientX - box.left) * this.width) / box.width;
    let best = 0;
    this.steps.forEach((step, i) => { if (Math.abs(this.x(step) - at) < Math.abs(this.x(this.steps[best]) - at)) best = i; });
    return this.steps.length ? best : null;
  }

  key(event) {
    const last = this.steps.length - 1, now = this.at ?? last, far = Math.max(1, Math.round(last / 20));
    const moves = { ArrowLeft: now - 1, ArrowRight: now + 1, PageUp: now + far, PageDown: now - far, Home: 0, End: last };
    if (!(event.key in moves) || last < 0) return;
    event.preventDefault();
    this.point(Math.min(last, Math.max(0, moves[event.key])));
  }

  point(at) {
    this.at = at;
    const step = at === null ? null : this.steps[at];
    this.cursor.setAttribute("visibility", step === null ? "hidden" : "visible");
    if (step !== null) for (const end of ["x1", "x2"]) this.cursor.setAttribute(end, this.x(step));
    this.figure.querySelector(".at").textContent = step === null ? "" : `${this.xlabel} ${short(step)}`;
    this.shown.forEach((points, i) => {
      const near = step === null ? points[points.length - 1] : points.filter(([x]) => x <= step).pop() ?? points[0];
      this.outputs[i].textContent = short(near?.[1]);
    });
  }
}

const charts = [...document.querySelectorAll("figure.chart")].map((figure) => new Chart(figure));
const drawAll = () => charts.forEach((chart) => chart.draw());
document.getElementById("smoothing")?.addEventListener("input", drawAll);
window.addEventListener("resize", drawAll);
window.addEventListener("beforeprint", drawAll);
drawAll();
document.documentElement.classList.add("drawn");
