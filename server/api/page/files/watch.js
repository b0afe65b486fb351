// Watch: one completion, and how each of its bytes was made.

import { complete, curl } from "./api.js";
import { $, amount, count, h, milliseconds, number, percent, tile } from "./dom.js";
import { Player } from "./player.js";
import { namedOption, named, ORIGINS, Run, told } from "./run.js";
import { PROMPTS, Settings } from "./settings.js";
import { dress, Strip } from "./strip.js";
import { draw } from "./timeline.js";

const MODULES = [["patcher", "entropy model"], ["encoder", "encoder"], ["global", "global"], ["decoder", "decoder"]];

export class Watch {
  constructor(report) {
    this._report = report;
    this.settings = new Settings("watch", $("watch-settings"), { decoding: true });
    this.strip = new Strip($("bytes"), (index) => this._point(index));
    this.player = new Player((rounds, phase) => this._show(rounds, phase), () => this._played());
    this.run = new Run("");
    this._abort = null;
    this._tiles();
    this._legend();
    $("prompt").value = PROMPTS.loop;
    for (const [name, prompt] of Object.entries(PROMPTS)) {
      $("examples").append(h("button", { type: "button", textContent: name, onclick: () => { $("prompt").value = prompt; this._request(); } }));
    }
    $("watch-form").addEventListener("submit", (event) => { event.preventDefault(); this.write(); });
    $("watch-form").addEventListener("input", () => this._request());
    $("watch-stop").addEventListener("click", () => this._abort?.abort());
    $("watch-copy").addEventListener("click", () => navigator.clipboard?.writeText($("watch-curl").textContent));
    $("play").addEventListener("click", () => this._play());
    $("scrub").addEventListener("input", () => { this.player.stop(); this._show(Number($("scrub").value), 0); this._rest(); });
    window.addEventListener("resize", () => draw($("timeline"), this.run, this._here));
    this._here = 0;
    this._request();
  }

  _tiles() {
    this.speed = tile("Speed");
    this.saved = tile("Weights read");
    this.passes = tile("Bytes a global pass");
    this.drafts = tile("Drafted bytes accepted");
    this.bars = h("div", { class: "passes" });
    const passes = h("div", { class: "tile" }, h("div", { class: "label", textContent: "Passes, beside BLT's" }), this.bars);
    $("watch-tiles").append(this.speed.box, this.saved.box, this.passes.box, this.drafts.box, passes);
    this._figures(0);
  }

  _legend() {
    const items = Object.entries(ORIGINS).map(([origin, words]) => {
      const sample = h("span", { class: `b o-${origin}`, "aria-hidden": "true", textContent: origin === "given" ? "a" : "" });
      return h("li", {}, sample, words);
    });
    const entropy = h("span", { class: "entropy", "aria-hidden": "true" }, h("i"), h("i"), h("i"));
    $("legend").append(...items, h("li", {}, h("span", { class: "cut", "aria-hidden": "true" }), "a patch begins"),
      h("li", {}, entropy, "entropy, to 4 nats"));
  }

  _body() {
    return { prompt: $("prompt").value, ...this.settings.sampling(), decoding: this.settings.decoding(), logprobs: 5, return_rounds: true };
  }

  _request() {
    const { logprobs, ...body } = this._body();
    $("watch-curl").textContent = curl({ ...body, stream: true });
  }

  async write() {
    this._abort?.abort();
    const abort = (this._abort = new AbortController());
    const body = this._body();
    const run = (this.run = new Run(body.prompt));
    this.strip.begin(run);
    this._report(null);
    $("watch-stop").hidden = false;
    this._play();
    try {
      for await (const event of complete(body, abort.signal)) {
        if (abort.signal.aborted) return;
        run.take(event);
      }
    } catch (error) {
      if (error.name !== "AbortError") this._report(error);
    } finally {
      if (this.run === run) {
        $("watch-stop").hidden = true;
        this.player.finish();
      }
    }
  }

  _play() {
    $("play").disabled = true;
    this.player.start(this.run, Number($("pace").value));
    if ($("watch-stop").hidden) this.player.finish();
  }

  _played() {
    this._rest();
    this._show(this.run.rounds.length, 0);
  }

  /** Nothing plays: it can be played again. */
  _rest() {
    $("play").disabled = this.run.rounds.length === 0;
  }

  _show(rounds, phase) {
    this.strip.show(rounds, phase);
    const scrub = $("scrub");
    const total = this.run.rounds.length;
    if (rounds === this._here && total === this._total && phase > 0) return;
    this._here = rounds;
    this._total = total;
    scrub.disabled = total === 0;
    scrub.max = total;
    scrub.value = rounds;
    const round = this.run.rounds[rounds - 1];
    scrub.setAttribute("aria-valuetext", round ? `round ${rounds} of ${total}. ${told(round)}` : "before the first round");
    draw($("timeline"), this.run, rounds);
    this._figures(rounds);
    this._round(rounds);
  }

  _figures(rounds) {
    const round = this.run?.rounds[rounds - 1];
    if (!round) {
      this.speed.set("–", "bytes/s", "how fast this text was written");
      this.saved.set("–", "MB a byte", "beside BLT's for the same bytes");
      this.passes.set("–", "bytes", "of the large model");
      this.drafts.set("–", "", "of those that were verified");
    }
    const bytes = round?.end ?? 0;
    const blt = { patcher: bytes, encoder: bytes, global: 1 + (round?.patchesSoFar ?? 0), decoder: bytes };
    this.bars.replaceChildren(...MODULES.flatMap(([name, words]) => {
      const made = round?.nfe[name] ?? 0;
      const fill = h("i");
      fill.style.width = round ? `${Math.min(100, (100 * made) / blt[name])}%` : "0";
      return [h("span", { textContent: words }), h("span", { class: "bar", title: `BLT: ${blt[name]}` }, fill), h("b", { textContent: made })];
    }));
    if (!round) return;
    this.speed.set(number(bytes / round.seconds), "bytes/s", `${count(bytes, "byte")} in ${milliseconds(round.seconds)}, watched`);
    const less = 1 - round.gb / round.gb_blt;
    this.saved.set(amount((1000 * round.gb) / bytes), "MB a byte",
      `BLT: ${amount((1000 * round.gb_blt) / bytes)} MB; ${less >= 0.005 ? `${percent(less)} less` : less <= -0.005 ? `${percent(-less)} more` : "the same"}`);
    this.passes.set(amount(bytes / round.nfe.global), "bytes", `BLT: ${amount(bytes / blt.global)}`);
    const before = this.run.rounds.slice(0, rounds);
    const drafted = before.reduce((sum, one) => sum + one.draft_token_ids.length, 0);
    const accepted = before.reduce((sum, one) => sum + one.accepted, 0);
    if (drafted) this.drafts.set(percent(accepted / drafted), "", `${number(accepted)} of ${number(drafted)}`);
    else this.drafts.set("–", "", round.method === "blt-d" ? "nothing is verified" : "nothing was drafted");
  }

  _round(rounds) {
    const round = this.run.rounds[rounds - 1];
    $("rounds-title").textContent = round ? `Round ${rounds} of ${this.run.rounds.length}` : "Rounds";
    if (!round) {
      $("round-facts").textContent = "Drag through the rounds, or use the arrow keys, once there is a text.";
      return;
    }
    const cells = [];
    const cell = (id, origin, more = "", step = 1) => {
      const span = h("span");
      const name = id === 14 ? "⏎" : id === 36 ? " " : String.fromCharCode(id - 4);
      dress(span, id - 4 < 128 && id >= 14 ? name : "·", { origin, step });
      if (more) span.classList.add(more);
      cells.push(span);
    };
    const { draft_token_ids: draft, accepted, steps } = round;
    if (draft.length) {
      draft.forEach((id, at) => cell(id, at < accepted ? round.origins[at] ?? "drafted" : "given", at < accepted ? "" : "refused"));
    } else {
      round.token_ids.forEach((id, at) => cell(id, round.origins[at], "", steps[at] || 1));
    }
    const line = h("div", { class: "draft" }, cells);
    if (draft.length) {
      line.append(" → ");
      cells.length = 0;
      if (round.token_ids.length > accepted) cell(round.token_ids[accepted], round.origins[accepted]);
      line.append(...cells);
    }
    $("round-facts").replaceChildren(h("div", { textContent: told(round) }), line);
  }

  _point(index) {
    const byte = this.run.bytes[index];
    if (!byte) return;
    const facts = [h("b", { textContent: named(byte.id) }), `, byte ${index + 1}: ${ORIGINS[byte.origin]}`];
    if (byte.step) facts.push(`, in step ${byte.step}`);
    facts.push(`; round ${byte.round + 1}`);
    if (byte.entropy !== undefined) facts.push(`; entropy before it ${byte.entropy.toFixed(2)} nats`);
    if (byte.patch) facts.push("; a patch begins here");
    const options = (byte.options ?? []).map(([name, logprob]) => {
      const chosen = namedOption(name) === named(byte.id);
      return h("span", { class: chosen ? "option chosen" : "option" }, namedOption(name), h("span", { textContent: percent(Math.exp(logprob), 1) }));
    });
    $("byte-facts").replaceChildren(h("div", {}, facts), h("div", { class: "options", "aria-label": "what else it could have been", role: "group" }, options));
  }
}
