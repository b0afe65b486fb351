// Race: one prompt and seed, several methods at once, and whether the lossless ones wrote the same bytes.

import { complete } from "./api.js";
import { $, amount, count, h, milliseconds, number, percent, still } from "./dom.js";
import { glyphs, Run } from "./run.js";
import { canBlock, METHODS, PROMPTS, Settings } from "./settings.js";

const FIRST = ["blt", "blt-s", "blt-dv", "blt-dsv", "blt-d"];
const [FEWEST, MOST] = [2, 5];
//: Seconds that the slowest lane takes on the screen, at least: the real race is over before one can look.
const ON_SCREEN = 9;

class Lane {
  constructor(method) {
    this.method = method;
    this.run = new Run("");
    this.shown = 0;
    this.place = h("span", { class: "place" });
    this.clock = h("div", { class: "clock", textContent: "…" });
    this.progress = h("progress", { max: 1, value: 0, "aria-label": `${method}: share written` });
    this.text = h("div", { class: "lane-text", tabindex: "0", role: "region", "aria-label": `what ${method} wrote` });
    this.text.tabIndex = 0;
    this.facts = h("dl");
    this.box = h("article", { class: "card lane" }, h("header", {}, h("h2", { textContent: method }), this.place),
      this.clock, this.progress, this.text, this.facts);
  }

  get seconds() {
    return this.run.rounds.at(-1)?.seconds ?? 0;
  }

  restart() {
    this.shown = 0;
    this.text.replaceChildren();
    this.progress.value = 0;
    this.place.textContent = "";
    this.box.classList.remove("first");
  }

  /** Show the rounds that were over `seconds` after the request arrived. */
  show(seconds, most) {
    const rounds = this.run.rounds;
    const ids = this.run.bytes.map(({ id }) => id);
    let last = null;
    while (this.shown < rounds.length && rounds[this.shown].seconds <= seconds) last = rounds[this.shown++];
    if (!last) return;
    const shown = glyphs(ids.slice(0, last.end));
    for (let at = this.text.childElementCount ? this._until : 0; at < last.end; at++) {
      const byte = this.run.bytes[at];
      const glyph = shown[at] === "⏎" ? "⏎\n" : shown[at];
      const run = this.text.lastElementChild;
      if (run && run.dataset.origin === byte.origin) run.textContent += glyph;
      else this.text.append(h("span", { class: `r o-${byte.origin}`, "data-origin": byte.origin, textContent: glyph }));
    }
    this._until = last.end;
    this.progress.value = Math.min(last.end / most, 1);
    this.clock.textContent = milliseconds(last.seconds);
    this.text.scrollTop = this.text.scrollHeight;
    const less = 1 - last.gb / last.gb_blt;
    const rows = [
      ["bytes a second", number(last.end / last.seconds)],
      ["global passes", number(last.nfe.global)],
      ["decoder passes", number(last.nfe.decoder)],
      ["MB of weights a byte", amount((1000 * last.gb) / last.end)],
      ["less than BLT reads", Math.abs(less) < 0.005 ? "–" : percent(less)],
    ];
    this.facts.replaceChildren(...rows.flatMap(([name, value]) => [h("dt", { textContent: name }), h("dd", { textContent: value })]));
  }
}

export class Race {
  constructor(report) {
    this._report = report;
    this.settings = new Settings("race", $("race-settings"), { decoding: false });
    this.lanes = [];
    this._frame = 0;
    this._abort = null;
    $("race-prompt").value = PROMPTS.class;
    for (const method of METHODS) {
      const box = h("input", { type: "checkbox", value: method, checked: FIRST.includes(method), onchange: () => this._check() });
      $("race-methods").append(h("label", { class: "chip" }, box, method));
    }
    $("race-form").addEventListener("submit", (event) => { event.preventDefault(); this.start(); });
    $("race-again").addEventListener("click", () => this._play());
    this._check();
  }

  get chosen() {
    return [...$("race-methods").querySelectorAll("input:checked")].map((box) => box.value);
  }

  limit(sizes) {
    for (const box of $("race-methods").querySelectorAll("input")) {
      box.disabled = !canBlock(box.value, sizes);
      if (box.disabled) box.checked = false;
    }
    this._check();
  }

  _check() {
    const fits = this.chosen.length >= FEWEST && this.chosen.length <= MOST;
    $("race-start").disabled = !fits;
    $("race-note").textContent = fits ? "They share one engine, and are slowed down on the screen. Times are the server's." : "Choose two to five methods.";
  }

  async start() {
    this._abort?.abort();
    const abort = (this._abort = new AbortController());
    cancelAnimationFrame(this._frame);
    this._report(null);
    $("verdict").replaceChildren();
    $("race-again").hidden = true;
    $("race-start").disabled = true;
    const sampling = this.settings.sampling();
    this._most = sampling.max_tokens;
    this.lanes = this.chosen.map((method) => new Lane(method));
    $("lanes").replaceChildren(...this.lanes.map((lane) => lane.box));
    const prompt = $("race-prompt").value;
    const one = async (lane) => {
      lane.run = new Run(prompt);
      const body = { prompt, ...sampling, decoding: { method: lane.method }, return_rounds: true };
      for await (const event of complete(body, abort.signal)) lane.run.take(event);
    };
    try {
      await Promise.all(this.lanes.map(one));
      this._play();
    } catch (error) {
      abort.abort();
      if (error.name !== "AbortError") this._report(error);
    } finally {
      this._check();
    }
  }

  /** Play the whole race, slowed down by the same factor in every lane. */
  _play() {
    cancelAnimationFrame(this._frame);
    $("verdict").replaceChildren();
    $("race-again").hidden = true;
    for (const lane of this.lanes) lane.restart();
    const slowest = Math.max(...this.lanes.map((lane) => lane.seconds));
    const factor = still() ? 0 : Math.max(ON_SCREEN / slowest, 1);
    $("race-note").textContent = factor > 1 ? `On the screen ${number(factor)} times slower than it was.` : "As fast as it was.";
    const began = performance.now();
    const arrived = [];
    const step = (now) => {
      const seconds = factor ? (now - began) / 1000 / factor : Infinity;
      for (const lane of this.lanes) {
        lane.show(seconds, this._most);
        if (lane.shown === lane.run.rounds.length && !arrived.includes(lane)) arrived.push(lane);
      }
      arrived.sort((one, other) => one.seconds - other.seconds);
      arrived.forEach((lane, index) => {
        lane.place.textContent = `#${index + 1}`;
        lane.box.classList.toggle("first", index === 0);
      });
      if (arrived.length < this.lanes.length) this._frame = requestAnimationFrame(step);
      else this._judge();
    };
    this._frame = requestAnimationFrame(step);
  }

  _judge() {
    $("race-again").hidden = false;
    const lossless = this.lanes.filter((lane) => lane.method !== "blt-d");
    const others = this.lanes.filter((lane) => lane.method === "blt-d");
    const said = [];
    const names = lossless.map((lane) => lane.method).join(", ");
    if (lossless.length > 1) {
      const first = lossless[0].run.data;
      const odd = lossless.slice(1).filter((lane) => difference(first, lane.run.data) >= 0);
      if (odd.length === 0) {
        said.push(h("p", {}, h("strong", { textContent: `The same ${count(first.length, "byte")}: ` }), `${names}. Compared one by one; checksum ${checksum(first)}.`));
      } else {
        const words = odd.map((lane) => `${lane.method} at byte ${difference(first, lane.run.data) + 1}`).join(", ");
        said.push(h("p", { class: "bad" }, h("strong", { textContent: "Not the same bytes: " }), `${words}. Without --deterministic a near-tie may be decided otherwise.`));
      }
    }
    for (const lane of others) {
      if (!lossless.length) continue;
      const at = difference(lossless[0].run.data, lane.run.data);
      said.push(h("p", { class: "other" }, h("strong", { textContent: `${lane.method} ` }),
        at < 0 ? "wrote the same bytes this time; it need not." : `is not lossless: it goes its own way from byte ${at + 1} on.`));
    }
    const slowest = [...this.lanes].sort((one, other) => other.seconds - one.seconds)[0];
    const winner = [...this.lanes].sort((one, other) => one.seconds - other.seconds)[0];
    const ratio = (slowest.seconds / winner.seconds).toFixed(1);
    said.push(h("p", {}, h("strong", { textContent: `${winner.method} ` }), `was first, after ${milliseconds(winner.seconds)}; ${slowest.method} took ${ratio} times as long.`));
    $("verdict").replaceChildren(...said);
  }
}

/** The first place where two texts differ; -1: nowhere. */
function difference(one, other) {
  const longest = Math.max(one.length, other.length);
  for (let at = 0; at < longest; at++) if (one[at] !== other[at]) return at;
  return -1;
}

/** FNV-1a, 32 bits: to compare two races at a glance. */
function checksum(bytes) {
  let hash = 0x811c9dc5;
  for (const byte of bytes) hash = Math.imul(hash ^ byte, 0x01000193);
  return (hash >>> 0).toString(16).padStart(8, "0");
}
