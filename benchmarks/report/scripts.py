"""The parts of the full run that are a script each, with the options of a full run and those of `--quick`."""

from __future__ import annotations

import shlex
from dataclasses import dataclass


@dataclass(frozen=True)
class Script:
    """`python -m fastblt.benchmarks.COMMAND`. `quick` are the options that make it small. `large`: it needs more than
    4 GB of memory. `needs` are packages without which it is left out."""

    command: str
    options: str = ""
    quick: str = ""
    model: bool = True
    large: bool = False
    needs: tuple[str, ...] = ()

    def arguments(self, model: str, quick: bool) -> list[str]:
        """What follows `python -m`."""
        chosen = ["--model", model] if self.model else []
        return shlex.split(f"fastblt.benchmarks.{self.command} {self.quick if quick else self.options}") + chosen


_PAIR = "--batch 1 --length 16 --rounds 1 --settings blt-s"
_TWO = "--weights float32 --weights int8"

#: By the name of the result's file. Those with the shortest runs come first: an interrupted run has most of the tables.
SCRIPTS = {
    "modes": Script("engine.speed modes", "--rounds 2", "--rounds 1 --requests 4 --length 16"),
    "overhead": Script("engine.speed overhead", "--rounds 5", "--rounds 1 --length 20"),
    "auto": Script("engine.speed auto", "--rounds 5", "--rounds 1 --requests 1 --length 40"),
    "fresh": Script("load.fresh", "--rounds 3", "--rounds 1 --clients 1 --setting blt"),
    "first_picture": Script("load.first_picture"),
    "front": Script("load.front", "--rounds 4", "--rounds 1 --streams 4 --num-prompts 4"),
    "page": Script("load.page", "--num-prompts 96", "--rounds 1 --streams 4 --num-prompts 4"),
    "fairness-prompts-4": Script("load.fairness prompts", "--count 4", "--count 1 --length 2000"),
    "fairness-prompts-8": Script("load.fairness prompts", "--count 8", "--count 2 --length 2000"),
    "fairness-prompts-40": Script("load.fairness prompts", "--count 40", "--count 3 --length 2000"),
    "fairness-outputs": Script("load.fairness outputs", "", "--streams 4 --output 4000"),
    "fairness-shared": Script("load.fairness shared", "--rounds 3", "--length 2000 --prefix 500 --n 4"),
    "starvation": Script("simulation.replay hour", "", "--seconds 60", model=False),
    "roofline": Script("savings.roofline", "", _PAIR),
    "roofline-512": Script("savings.roofline", "--batch 1 --length 512 --rounds 3", _PAIR),
    "host_time": Script("engine.host_time", "--steps 150 --rounds 3", "--steps 10 --rounds 1 --requests 1"),
    "holding": Script("engine.holding weights", "", "--requests 4 --length 16 --rounds 1"),
    "maps": Script("kernels.maps", "--rounds 2", "--rounds 1 --rows 1 --inputs 512 --outputs 512", model=False),
    "weights": Script("checks.weights", "--num-prompts 12", f"--num-prompts 1 --output-len 8 {_TWO}"),
    "quality": Script("evaluation.methods", "", "--prompts 8 --length 16 --setting blt --setting 'blt-d-8 a0.7'"),
    "constraints": Script("checks.constraints", "--outputs 100 --utf8 500", "--outputs 10 --utf8 10"),
    "lossless": Script("checks.lossless", "--length 128", "--prompts 2 --sampled 1 --length 16"),
    "gpu_prediction": Script("savings.gpu_prediction", "", "--shape 1b --chip H200 --batch 1"),
    "soak": Script("checks.soak", "", "--seconds 30"),
    "narrow-1b": Script(
        "savings.narrow", "--length 32 --rounds 2", f"--batch 1 --length 8 --rounds 1 {_TWO}", large=True
    ),
    "peer_loop": Script("kernels.peer_loop", "", "--weights 0.2 --rounds 1", large=True, needs=("llama_cpp", "gguf")),
    "token_loop": Script(
        "report.token_loop", "", "--requests 1 --rounds 1 --output-len 16", needs=("llama_cpp", "gguf", "tokenizers")
    ),
    "keys_values": Script("savings.keys_values", "", "--patches 64 --num-prompts 1 --rounds 1", large=True),
    "hold_sweep": Script("engine.holding latency", "", "--requests 2 --length 8", large=True),
    "large-bf16": Script("load.large", "--shape 7b", "--shape 1b --length 8", large=True),
    "large-int8": Script("load.large", "--shape 7b --weights int8", "--shape 1b --length 8 --weights int8", large=True),
}
