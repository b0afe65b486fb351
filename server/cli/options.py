"""Options that several commands share, and the headings of their help."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated

import typer

from fastblt.server.request import EntropyRule, Unmasking
from fastblt.server.settings import EngineSettings, HttpSettings, ServiceSettings

_UNITS = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


class WeightStorage(StrEnum):
    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT8 = "int8"


class Dtype(StrEnum):
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


def parse_size(text: str) -> int:
    """Bytes of a size such as 512MiB, 2GiB, 1.5G or 1073741824; units are binary. Raises typer.BadParameter."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([kmgt]?)(?:i?b)?", str(text).strip().lower(), re.ASCII)
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise typer.BadParameter(f"{text!r} is no size; write 512MiB, 2GiB or a number of bytes")
    return size


#: Headings under which `--help` groups options.
ENGINE = "Engine"
SAMPLING = "Sampling"
DECODING = "Decoding"
CARE = "Deadlines and failures"
ACCESS = "Access"
WATCH = "Logs and metrics"
ENGINE_DEFAULTS = EngineSettings()
SERVICE_DEFAULTS = ServiceSettings()
HTTP_DEFAULTS = HttpSettings()

Revision = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Branch, tag or commit of a Hub id. Default: the newest.", rich_help_panel=ENGINE
    ),
]
Device = Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda or cuda:N.", rich_help_panel=ENGINE)]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(
        "--dtype", help="Type of weights and caches. Default: float32, on a GPU bfloat16.", rich_help_panel=ENGINE
    ),
]
WeightsOption = Annotated[
    WeightStorage,
    typer.Option(
        "--weights",
        help="How a large model's weights are kept on a CPU. auto: as the checkpoint has them. int8 changes results.",
        rich_help_panel=ENGINE,
    ),
]
CacheSize = Annotated[
    int | None,
    typer.Option(
        parser=parse_size,
        metavar="SIZE",
        help="Memory of all caches, such as 512MiB. Default: an eighth of the machine's, or what a GPU has free.",
        rich_help_panel=ENGINE,
    ),
]
MaxModelLen = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=1,
        help="Bytes of prompt and completion together; less where the caches do not hold so much.",
        rich_help_panel=ENGINE,
    ),
]
MaxPassRows = Annotated[
    int,
    typer.Option(metavar="N", min=1, help="Rows of one pass; longer prompts go in chunks.", rich_help_panel=ENGINE),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        metavar="NATS", help="Entropy above which a patch begins. Default: the checkpoint's.", rich_help_panel=ENGINE
    ),
]
MaxPatchLength = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        help="Bytes of a patch at most; 0 is no limit. Default: the checkpoint's.",
        rich_help_panel=ENGINE,
    ),
]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        help="Give the same bytes whatever else runs in the batch, without exception; somewhat slower.",
        rich_help_panel=ENGINE,
    ),
]
PrefixCache = Annotated[
    bool,
    typer.Option(
        "--prefix-cache/--no-prefix-cache",
        help="Keep what was computed for requests that begin with the same bytes. Their first byte's time tells that "
        "they do: requests may be kept apart by a cache_salt.",
        rich_help_panel=ENGINE,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="Threads of arithmetic on a CPU. Default: one a core.", rich_help_panel=ENGINE
    ),
]
BlockSize = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Bytes of a diffusion block in blt-d, blt-dv and blt-dsv. Default: 8, or the smallest trained size.",
        rich_help_panel=DECODING,
    ),
]
DraftLength = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Bytes drafted in a round of blt-s and blt-dsv, 1 to 32. Default: 8, in blt-dsv 16.",
        rich_help_panel=DECODING,
    ),
]
UnmaskingOption = Annotated[
    Unmasking | None,
    typer.Option(
        "--unmasking",
        metavar="RULE",
        help="Which masked bytes of a block a step fills: confidence, entropy, or one_step for all at once. "
        "Default: confidence in blt-d, one_step in blt-dv and blt-dsv.",
        rich_help_panel=DECODING,
    ),
]
Confidence = Annotated[
    float | None,
    typer.Option(
        metavar="P",
        help="Under confidence unmasking a step fills every byte whose likeliest value is more probable than this, or "
        "else the surest one: higher is slower and better. 0 to 1. Default: 0.7.",
        rich_help_panel=DECODING,
    ),
]
EntropyBound = Annotated[
    float | None,
    typer.Option(
        metavar="NATS",
        help="Under entropy unmasking a step fills the surest bytes while the sum of their entropies stays within "
        "this. Default: 0.8.",
        rich_help_panel=DECODING,
    ),
]
EntropyRuleOption = Annotated[
    EntropyRule | None,
    typer.Option(
        "--entropy-rule",
        metavar="RULE",
        help="What counts for that sum: inclusive, all of them; exclusive_max, all but the largest. "
        "Default: inclusive.",
        rich_help_panel=DECODING,
    ),
]
MaxSteps = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Denoising steps of a block at most; the last fills what is left. 1 to 32. Default: no limit.",
        rich_help_panel=DECODING,
    ),
]
UntrainedBlockSize = Annotated[
    bool,
    typer.Option(
        "--allow-untrained-block-size",
        help="Take block sizes that the checkpoint was not trained for.",
        rich_help_panel=DECODING,
    ),
]
