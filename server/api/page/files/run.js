// One completion as its rounds tell it: for every byte what it is, how it was made, and what else it could have been.

const OFFSET = 4; // byte b is id b + 4
const encoder = new TextEncoder();

export const ORIGINS = {
  given: "given: the prompt",
  causal: "by the whole model",
  drafted: "drafted by the decoder, accepted",
  block: "drafted by a block, accepted",
  corrected: "corrected: the draft was refused",
  filled: "filled by a block, not verified",
};

export class Run {
  constructor(prompt) {
    this.given = encoder.encode(prompt);
    this.bytes = []; // {id, origin, step, round, entropy, patch, options}
    this.rounds = [];
    this.reason = null;
    this.efficiency = null;
    this._entropies = 0;
    this._scored = 0;
  }

  /** Take what an event tells. Returns whether there is a new round. */
  take(event) {
    this.efficiency = event.efficiency ?? this.efficiency;
    const choice = event.choices[0];
    if (!choice) return false;
    for (const round of choice.rounds ?? []) this._round(round);
    this._options(choice.logprobs);
    this.reason = choice.finish_reason ?? this.reason;
    return (choice.rounds ?? []).length > 0;
  }

  _round(round) {
    const index = this.rounds.length;
    const filled = round.origins[0] === "filled";
    round.token_ids.forEach((id, at) => {
      const origin = round.origins[at];
      this.bytes.push({ id, origin, step: filled || origin === "block" ? round.steps[at] : 0, round: index });
    });
    for (const entropy of round.entropies) this.bytes[this._entropies++].entropy = entropy;
    for (const start of round.patches) this.bytes[start].patch = true;
    // How many patches, and so passes of BLT's global transformer, there are up to here.
    const before = this.rounds.at(-1)?.patchesSoFar ?? 0;
    round.patchesSoFar = before + round.patches.filter((start) => start > 0).length;
    round.end = round.start + round.token_ids.length;
    this.rounds.push(round);
  }

  _options(logprobs) {
    for (const top of logprobs?.top_logprobs ?? []) {
      const byte = this.bytes[this._scored++];
      if (byte && top) byte.options = Object.entries(top).sort((one, other) => other[1] - one[1]);
    }
  }

  /** A Uint8Array of the completion's bytes. */
  get data() {
    return Uint8Array.from(this.bytes, ({ id }) => Math.max(id - OFFSET, 0));
  }
}

const SHOWN = { 10: "⏎", 13: "␍", 9: "⇥" };

/** What to show for every byte: a character at its first byte, "‥" at its others, hex where there is none. */
export function glyphs(ids) {
  const shown = [];
  const decoder = new TextDecoder("utf-8", { fatal: true });
  for (let at = 0; at < ids.length; ) {
    const byte = ids[at] - OFFSET;
    const length = byte < 0x80 ? 1 : byte < 0xe0 ? 2 : byte < 0xf0 ? 3 : 4;
    let text = null;
    if (byte >= 0 && at + length <= ids.length) {
      try {
        text = decoder.decode(Uint8Array.from(ids.slice(at, at + length), (id) => id - OFFSET));
      } catch {
        text = null;
      }
    }
    if (text === null || (length === 1 && byte < 32 && !SHOWN[byte])) {
      shown.push(byte < 0 ? "∅" : byte.toString(16).padStart(2, "0"));
      at += 1;
      continue;
    }
    shown.push(SHOWN[byte] ?? text);
    for (let rest = 1; rest < length; rest++) shown.push("‥");
    at += length;
  }
  return shown;
}

/** A byte in words: `'e'`, `newline`, `byte 0xc3`. */
export function named(id) {
  const byte = id - OFFSET;
  if (byte < 0) return ["<boe>", "<bos>", "<eos>", "<bpe>"][id];
  if (byte === 10) return "newline";
  if (byte === 32) return "space";
  if (byte === 9) return "tab";
  return byte > 32 && byte < 127 ? `‘${String.fromCharCode(byte)}’` : `byte 0x${byte.toString(16).padStart(2, "0")}`;
}

/** A name of the API's logprobs in the same words. */
export function namedOption(name) {
  const hex = /^bytes:\\x([0-9a-f]{2})$/.exec(name);
  if (hex) return named(parseInt(hex[1], 16) + OFFSET);
  return name.length === 1 ? named(name.charCodeAt(0) + OFFSET) : name;
}

/** A round in one sentence. */
export function told(round) {
  const drafted = round.draft_token_ids.length;
  const made = round.token_ids.length;
  const bytes = (n) => `${n} byte${n === 1 ? "" : "s"}`;
  if (round.origins[0] === "filled") {
    return `${round.method}: a block of ${bytes(made)}, filled in ${Math.max(...round.steps)} steps, from the sure to the unsure; nothing verifies it.`;
  }
  if (!drafted) return `${round.method}: ${bytes(made)} by the whole model, nothing drafted.`;
  const last = round.accepted === drafted ? "and one more came with the verification" : "and the whole model corrected the next one";
  return `${round.method}: ${bytes(drafted)} drafted, ${round.accepted} accepted, ${last}: ${bytes(made)} from one pass of the whole model.`;
}
