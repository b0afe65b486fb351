"""Options that several commands share, and the headings of their help."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated

import typer

from fastblt.server.request import EntropyRule, Unmasking
from fastblt.server.settings import EngineSettings, ServiceSettings

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

Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.", rich_help_panel=ENGINE)]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.", rich_help_panel=ENGINE)]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Of weights and caches.", rich_help_panel=ENGINE)]
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
        help="Memory of all caches, such as 512MiB or 2GiB. Default: an eighth of the machine's.",
        rich_help_panel=ENGINE,
    ),
]
MaxModelLen = Annotated[
    int, typer.Option(min=1, help="Bytes of prompt and completion together.", rich_help_panel=ENGINE)
]
MaxPassRows = Annotated[
    int, typer.Option(min=1, help="Rows of one pass; longer prompts go in chunks.", rich_help_panel=ENGINE)
]
Threshold = Annotated[
    float | None,
    typer.Option(
        help="Entropy, in nats, above which a patch starts. Default: the checkpoint's.", rich_help_panel=ENGINE
    ),
]
MaxPatchLength = Annotated[
    int | None,
    typer.Option(min=0, help="Bytes; 0 is no maximum. Default: the checkpoint's.", rich_help_panel=ENGINE),
]
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="The same bytes in any batch, always.", rich_help_panel=ENGINE)
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
    int | None, typer.Option(min=1, help="Of arithmetic on CPUs. Default: one a core.", rich_help_panel=ENGINE)
]
BlockSize = Annotated[
    int | None, typer.Option(help="Of blt-d, blt-dv and blt-dsv, in bytes.", rich_help_panel=DECODING)
]
DraftLength = Annotated[int | None, typer.Option(help="Of blt-s and blt-dsv, in bytes.", rich_help_panel=DECODING)]
UnmaskingOption = Annotated[
    Unmasking | None,
    typer.Option("--unmasking", help="Which positions of a block are filled first.", rich_help_panel=DECODING),
]
Confidence = Annotated[float | None, typer.Option(help="Of confidence unmasking.", rich_help_panel=DECODING)]
EntropyBound = Annotated[float | None, typer.Option(help="Of entropy unmasking, in nats.", rich_help_panel=DECODING)]
EntropyRuleOption = Annotated[
    EntropyRule | None, typer.Option("--entropy-rule", help="Of entropy unmasking.", rich_help_panel=DECODING)
]
MaxSteps = Annotated[int | None, typer.Option(help="Denoising steps of a block.", rich_help_panel=DECODING)]
UntrainedBlockSize = Annotated[
    bool,
    typer.Option(
        "--allow-untrained-block-size", help="Take block sizes that were not trained.", rich_help_panel=DECODING
    ),
]
