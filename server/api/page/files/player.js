// Plays a run's rounds: at the pace they had, slowly enough to see, or at once. New rounds may arrive meanwhile.

import { still } from "./dom.js";

//: Milliseconds that a round takes when it is slow: a byte by itself, and a draft or a block.
const SLOW = { single: 90, draft: 620 };
//: The share of a round in which its draft is made; then it is verified.
const DRAFTING = 0.72;

export class Player {
  /** `show(rounds, phase)` draws; `ended()` is called when all there is has been shown and nothing more will come. */
  constructor(show, ended) {
    this._show = show;
    this._ended = ended;
    this._frame = 0;
    this.playing = false;
  }

  start(run, pace) {
    this.stop();
    this.run = run;
    this.pace = still() ? -1 : pace;
    this.done = 0;
    this.complete = false;
    this.playing = true;
    this._began = performance.now();
    this._roundBegan = this._began;
    this._frame = requestAnimationFrame((now) => this._step(now));
  }

  /** No more rounds will come. */
  finish() {
    this.complete = true;
  }

  stop() {
    cancelAnimationFrame(this._frame);
    this.playing = false;
  }

  _step(now) {
    const rounds = this.run.rounds;
    let phase = 0;
    if (this.pace === 0) {
      while (this.done < rounds.length) {
        const round = rounds[this.done];
        const drafts = round.draft_token_ids.length > 0 || round.origins[0] === "filled";
        const took = (now - this._roundBegan) / (drafts ? SLOW.draft : SLOW.single);
        if (took < 1) {
          phase = drafts ? Math.min(took / DRAFTING, 1) : 0;
          break;
        }
        this._roundBegan += drafts ? SLOW.draft : SLOW.single;
        this.done += 1;
      }
      if (this.done === rounds.length) this._roundBegan = now;
    } else if (this.pace > 0) {
      const seconds = (now - this._began) / 1000;
      while (this.done < rounds.length && rounds[this.done].seconds <= seconds) this.done += 1;
    } else {
      this.done = rounds.length;
    }
    this._show(this.done, phase);
    if (this.complete && this.done === rounds.length) {
      this.playing = false;
      this._ended();
      return;
    }
    this._frame = requestAnimationFrame((later) => this._step(later));
  }
}
