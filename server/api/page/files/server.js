// Server: what it does now and in the last minutes, from its metrics. Asks only while it is looked at.

import { text } from "./api.js";
import { $, amount, h, number, percent, svg, tile } from "./dom.js";

const EVERY = 2000;
const [LEAST, KEPT] = [15, 150];
const [WIDTH, HEIGHT] = [300, 92];

/** Samples by name with labels. */
function parse(metrics) {
  const samples = {};
  for (const line of metrics.split("\n")) {
    if (line && line[0] !== "#") {
      const space = line.lastIndexOf(" ");
      samples[line.slice(0, space)] = Number(line.slice(space + 1));
    }
  }
  return samples;
}

const state = (samples) => Object.keys(samples).find((name) => name.startsWith("fastblt_engine_state{") && samples[name] === 1)?.match(/state="(\w+)"/)[1];

class Chart {
  constructor(label, unit, color) {
    this.values = [];
    this.unit = unit;
    this.latest = h("div", { class: "latest", textContent: "–" });
    this.svg = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" });
    this.box = h("article", { class: "card chart" }, h("h2", { textContent: label }), this.latest, this.svg);
    this.box.style.setProperty("--c", `var(--${color})`);
  }

  push(value) {
    if (value === null || Number.isNaN(value)) return;
    this.values.push(value);
    if (this.values.length > KEPT) this.values.shift();
    this.latest.textContent = this.unit === "%" ? percent(value) : `${amount(value)} ${this.unit}`;
    this._draw();
  }

  _draw() {
    const top = this.unit === "%" ? 1 : Math.max(1, ...this.values) * 1.1;
    // The last five minutes; less, drawn wider, at the beginning.
    const shown = Math.max(LEAST, this.values.length);
    const x = (at) => (WIDTH * at) / (shown - 1);
    const y = (value) => HEIGHT - 2 - (HEIGHT - 6) * (value / top);
    const from = shown - this.values.length;
    const points = this.values.map((value, at) => `${x(from + at).toFixed(1)},${y(value).toFixed(1)}`);
    this.svg.replaceChildren(
      svg("line", { class: "base", x1: 0, x2: WIDTH, y1: HEIGHT - 2, y2: HEIGHT - 2 }),
      svg("polygon", { class: "area", points: `${x(from).toFixed(1)},${HEIGHT - 2} ${points.join(" ")} ${WIDTH},${HEIGHT - 2}` }),
      svg("polyline", { class: "line", points: points.join(" "), "vector-effect": "non-scaling-stroke" }),
    );
  }
}

export class Server {
  constructor(report) {
    this._report = report;
    this._timer = 0;
    this._last = null;
    this.tiles = { state: tile("Engine"), load: tile("Requests"), written: tile("Written so far"), pages: tile("Fullest cache") };
    $("server-tiles").append(...Object.values(this.tiles).map((one) => one.box));
    this.charts = {
      rate: new Chart("Written", "bytes/s", "causal"),
      running: new Chart("Running requests", "", "drafted"),
      waiting: new Chart("Waiting requests", "", "corrected"),
      pages: new Chart("Cache pages in use", "%", "block"),
      acceptance: new Chart("Drafted bytes accepted", "%", "drafted"),
      saved: new Chart("Bytes a pass of the global transformer", "", "filled"),
    };
    $("server-charts").append(...Object.values(this.charts).map((one) => one.box));
    document.addEventListener("visibilitychange", () => this._look());
  }

  /** Whether this view is the one that is shown. */
  set open(open) {
    this._open = open;
    this._look();
  }

  _look() {
    clearTimeout(this._timer);
    if (this._open && !document.hidden) this._ask();
  }

  async _ask() {
    try {
      this._take(parse(await text("metrics")), performance.now() / 1000);
      this._report(null);
    } catch (error) {
      this._report(error);
    }
    clearTimeout(this._timer);
    if (this._open && !document.hidden) this._timer = setTimeout(() => this._ask(), EVERY);
  }

  _take(now, seconds) {
    const of = (name) => now[`fastblt_${name}`] ?? 0;
    this.tiles.state.set(state(now) ?? "?", "", `${number(of("passes_total"))} decoder passes so far`);
    this.tiles.load.set(number(of("num_requests_running")), "running", `${number(of("num_requests_waiting"))} waiting`);
    this.tiles.written.set(number(of("generation_tokens_total")), "bytes", `${number(of("prompt_tokens_total"))} of prompts read`);
    this.tiles.pages.set(percent(of("kv_cache_usage_perc")), "in use", `${number(of("num_preemptions_total"))} requests put back`);
    this.charts.running.push(of("num_requests_running"));
    this.charts.waiting.push(of("num_requests_waiting"));
    this.charts.pages.push(of("kv_cache_usage_perc"));
    const last = this._last;
    this._last = { now, seconds };
    if (!last || seconds - last.seconds < 0.5) return;
    const grown = (name) => of(name) - (last.now[`fastblt_${name}`] ?? 0);
    const written = grown("generation_tokens_total");
    this.charts.rate.push(written / (seconds - last.seconds));
    const drafted = grown("spec_decode_num_draft_tokens_total");
    this.charts.acceptance.push(drafted > 0 ? grown("spec_decode_num_accepted_tokens_total") / drafted : null);
    const passes = grown('nfe_total{module="global"}');
    this.charts.saved.push(passes > 0 ? written / passes : null);
  }
}
