// The rounds of a run over time, one column each: what was accepted, corrected, refused.

import { svg } from "./dom.js";

const HEIGHT = 84;
const FLOOR = 66;

/** Draw `run` up to and with round `here` (1-based; 0: none). */
export function draw(box, run, here) {
  const width = box.clientWidth || 600;
  box.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  const rounds = run.rounds;
  const parts = [svg("line", { class: "base", x1: 0, x2: width, y1: FLOOR, y2: FLOOR })];
  const each = width / Math.max(rounds.length, 1);
  const tallest = Math.max(1, ...rounds.map((r) => Math.max(r.token_ids.length, r.draft_token_ids.length + 1)));
  const unit = (FLOOR - 6) / tallest;
  if (here) parts.push(svg("rect", { class: "here", x: (here - 1) * each, width: each, y: 0, height: FLOOR }));
  const gap = each > 6 ? 2 : each > 3 ? 1 : 0;
  rounds.forEach((round, index) => {
    let y = FLOOR;
    let run_ = 0;
    const stack = (kind, bytes) => {
      const tall = bytes * unit;
      y -= tall;
      parts.push(svg("rect", { class: `t-${kind}`, x: index * each + gap / 2, width: Math.max(each - gap, 0.5), y, height: Math.max(tall - 0.6, 0.5), rx: 1.5 }));
    };
    round.origins.forEach((origin, at) => {
      run_ += 1;
      if (round.origins[at + 1] !== origin) {
        stack(origin, run_);
        run_ = 0;
      }
    });
    const refused = round.draft_token_ids.length - round.accepted - (round.accepted < round.draft_token_ids.length ? 1 : 0);
    if (refused > 0 && each > 2) stack("refused", refused);
  });
  if (rounds.length) {
    parts.push(svg("text", { x: 0, y: HEIGHT - 3 }, `${rounds.length} rounds; height: bytes, dashed: refused`));
    parts.push(svg("text", { x: width, y: HEIGHT - 3, "text-anchor": "end" }, `${Math.round(1000 * rounds.at(-1).seconds)} ms`));
  }
  box.replaceChildren(...parts);
}
