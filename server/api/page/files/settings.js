// The fields of a request: which there are, and the body that they make.

import { field, h } from "./dom.js";

export const METHODS = ["auto", "blt", "blt-s", "blt-dv", "blt-dsv", "blt-d"];
const BLOCKS = ["blt-d", "blt-dv", "blt-dsv"];
const DRAFTS = ["blt-s", "blt-dsv"];

export const PROMPTS = {
  loop: "while True:\n    line = file.readline()\n",
  class: "class Point:\n    def __init__(self, x, y):\n",
  test: "class TestQueue(unittest.TestCase):\n    def test_",
  module: "import os\nimport sys\n\n\ndef main(",
};

const SAMPLING = {
  max_tokens: ["Bytes", { type: "number", min: 1, max: 4000, value: 240, required: true, title: "max_tokens: a token is a byte" }],
  temperature: ["Temperature", { type: "number", min: 0, max: 2, step: 0.1, value: 0.8, required: true, title: "0 is greedy" }],
  top_p: ["Top p", { type: "number", min: 0.05, max: 1, step: 0.05, value: 0.95, required: true, title: "the likeliest bytes with this much probability together" }],
  seed: ["Seed", { type: "number", min: 0, max: 999999, value: 1, required: true, title: "the same seed gives the same bytes" }],
};

const DECODING = {
  draft_length: ["Draft length", { type: "number", min: 1, max: 32, placeholder: "default", title: "bytes drafted in a round" }, DRAFTS],
  block_size: ["Block size", { options: [["", "default"]], title: "bytes of a block" }, BLOCKS],
  unmasking: ["Unmasking", { options: [["", "default"], ["confidence"], ["entropy"], ["one_step"]], title: "which masked bytes a step fills" }, BLOCKS],
  max_steps: ["Most steps", { type: "number", min: 1, max: 32, placeholder: "default", title: "denoising steps of a block" }, BLOCKS],
};

/** Fields of sampling alone, or with the method and its settings, within `box`. */
export class Settings {
  constructor(prefix, box, { decoding }) {
    this.controls = {};
    this.boxes = {};
    const add = (name, label, options) => {
      const { box: one, control } = field(prefix, name, label, options);
      this.controls[name] = control;
      this.boxes[name] = one;
      box.append(one);
    };
    if (decoding) {
      add("method", "Method", { options: METHODS.map((name) => [name]), value: "blt-dsv" });
      for (const [name, [label, options]] of Object.entries(DECODING)) add(name, label, { ...options });
      this.controls.method.addEventListener("change", () => this._fit());
    }
    for (const [name, [label, options]] of Object.entries(SAMPLING)) add(name, label, { ...options });
    if (decoding) this._fit();
  }

  _fit() {
    for (const [name, [, , of]] of Object.entries(DECODING)) this.boxes[name].hidden = !of.includes(this.controls.method.value);
  }

  /** Leave out what this checkpoint cannot: methods with blocks, and sizes that it was not trained for. */
  limit(sizes) {
    const method = this.controls.method;
    if (!method) return;
    if (!sizes.length) {
      for (const option of [...method.options]) if (BLOCKS.includes(option.value)) option.remove();
      method.value = "blt-s";
    }
    const size = this.controls.block_size;
    size.replaceChildren(...["", ...sizes].map((one) => h("option", { value: one, textContent: one === "" ? "default" : one })));
    this._fit();
  }

  sampling() {
    return Object.fromEntries(Object.keys(SAMPLING).map((name) => [name, Number(this.controls[name].value)]));
  }

  decoding() {
    const asked = { method: this.controls.method.value };
    for (const name of Object.keys(DECODING)) {
      const { value } = this.controls[name];
      if (!this.boxes[name].hidden && value !== "") asked[name] = name === "unmasking" ? value : Number(value);
    }
    if (asked.max_steps !== undefined && asked.method !== "blt-d" && asked.unmasking === undefined) asked.unmasking = "confidence";
    return asked;
  }
}

export function canBlock(method, sizes) {
  return sizes.length > 0 || !BLOCKS.includes(method);
}
