// Draws a run's bytes as a strip: colour and underline say how a byte was made, height its entropy, gaps its patches.

import { h } from "./dom.js";
import { glyphs } from "./run.js";

const MOST_NATS = 4;
const MASK = "▒";

export function dress(span, glyph, byte) {
  span.textContent = glyph === "⏎" ? "⏎" : glyph;
  span.className = `b o-${byte.origin}`;
  if (glyph === "⏎") span.classList.add("nl");
  else if (glyph.length === 2 && glyph !== "‥") span.classList.add("odd");
  if (byte.patch) span.classList.add("p");
  if (byte.entropy !== undefined) {
    span.style.setProperty("--e", Math.min(byte.entropy / MOST_NATS, 1).toFixed(3));
  }
  if (byte.origin === "filled") span.style.setProperty("--sure", (1 / byte.step).toFixed(2));
}

export class Strip {
  constructor(box, onPoint) {
    this.box = box;
    this.run = null;
    this.cells = [];
    this.at = -1;
    this._ghosts = [];
    this._onPoint = onPoint;
    const pointed = (event) => {
      const index = Number(event.target.closest?.(".b")?.dataset.at ?? -1);
      if (index >= 0) this.point(index);
    };
    box.addEventListener("pointerover", pointed);
    box.addEventListener("click", pointed);
    box.addEventListener("keydown", (event) => this._key(event));
  }

  begin(run) {
    this.run = run;
    this.at = -1;
    this.cells = [];
    this._ghosts = [];
    this.box.replaceChildren();
    const ids = Array.from(run.given, (byte) => byte + 4);
    glyphs(ids).forEach((glyph) => this._append({ origin: "given" }, glyph));
    this._given = this.cells.length;
    this._shown = 0;
    this._rounds = -1;
  }

  _append(byte, glyph) {
    const span = h("span");
    dress(span, glyph, byte);
    this.cells.push(span);
    this.box.append(span);
    if (glyph === "⏎") this.box.append(h("br"));
    return span;
  }

  /** Show the bytes of the first `rounds` rounds, and of the next one's draft the share `phase` of its making. */
  show(rounds, phase = 0) {
    const run = this.run;
    for (const ghost of this._ghosts) ghost.remove();
    this._ghosts = [];
    const until = rounds ? run.rounds[rounds - 1].end : 0;
    if (until < this._shown) {
      while (this.cells.length > this._given + until) {
        const cell = this.cells.pop();
        if (cell.nextSibling?.nodeName === "BR") cell.nextSibling.remove();
        cell.remove();
      }
      this._shown = until;
    }
    if (until > this._shown) {
      const shown = glyphs(run.bytes.map(({ id }) => id).slice(0, until));
      for (let at = this._shown; at < until; at++) {
        const span = this._append(run.bytes[at], shown[at]);
        span.dataset.at = at;
        span.classList.add("new");
      }
      this._shown = until;
    }
    // Between two frames of the same round only its ghosts change.
    if (rounds !== this._rounds || run.rounds.length !== this._known) this._settle(rounds);
    if (phase > 0 && rounds < run.rounds.length) this._ghost(run.rounds[rounds], phase);
  }

  /** What has become known of the bytes that are shown, and which of them the last round made. */
  _settle(rounds) {
    const run = this.run;
    this._rounds = rounds;
    this._known = run.rounds.length;
    const now = rounds ? run.rounds[rounds - 1] : null;
    for (let at = 0; at < this._shown; at++) {
      const cell = this.cells[this._given + at];
      const byte = run.bytes[at];
      // A block's entropies and patches are known a round later.
      if (byte.patch && !cell.classList.contains("p")) cell.classList.add("p");
      if (byte.entropy !== undefined && !cell.style.getPropertyValue("--e")) dress(cell, cell.textContent, byte);
      cell.classList.toggle("now", now !== null && rounds < run.rounds.length && at >= now.start);
    }
  }

  /** The draft or block of a round while it is made: bytes one after another, or masks that are filled by step. */
  _ghost(round, phase) {
    const filled = round.origins[0] === "filled";
    const ids = filled ? round.token_ids : round.draft_token_ids;
    if (!ids.length) return;
    const most = Math.max(1, ...round.steps);
    const blocks = round.steps.some((step) => step > 0);
    const shown = glyphs(ids);
    ids.forEach((id, at) => {
      const step = round.steps[at] ?? 0;
      const there = blocks && step ? step <= Math.ceil(phase * most) : at < Math.ceil(phase * ids.length);
      if (!there && !blocks) return;
      const span = h("span");
      dress(span, there ? shown[at] : MASK, { origin: filled ? "filled" : step ? "block" : "drafted", step: step || 1 });
      span.classList.add(there ? "ghost" : "mask");
      this._ghosts.push(span);
      this.box.append(span);
    });
  }

  point(index) {
    this.cells[this._given + this.at]?.classList.remove("at");
    this.at = index;
    const cell = this.cells[this._given + index];
    cell?.classList.add("at");
    this._onPoint(index);
    return cell;
  }

  _key(event) {
    const last = this._shown - 1;
    const to = { ArrowRight: this.at + 1, ArrowLeft: this.at - 1, Home: 0, End: last,
      ArrowDown: this._round(1), ArrowUp: this._round(-1) }[event.key];
    if (to === undefined || last < 0) return;
    event.preventDefault();
    this.point(Math.max(0, Math.min(last, to)))?.scrollIntoView({ block: "nearest" });
  }

  /** The first byte of the round before or after the one that is pointed at. */
  _round(step) {
    const here = this.run?.bytes[this.at];
    return here ? this.run.rounds[here.round + step]?.start : 0;
  }
}
