"""`fastblt generate`."""

from __future__ import annotations

from typing import Annotated

import typer

from fastblt.server import logs
from fastblt.server.cli.errors import clean_errors, quiet_openmp
from fastblt.server.cli.options import (
    DECODING,
    ENGINE_DEFAULTS,
    SAMPLING,
    BlockSize,
    CacheSize,
    Confidence,
    Deterministic,
    Device,
    DraftLength,
    DtypeOption,
    EntropyBound,
    EntropyRuleOption,
    MaxModelLen,
    MaxPassRows,
    MaxPatchLength,
    MaxSteps,
    Revision,
    Threads,
    Threshold,
    UnmaskingOption,
    UntrainedBlockSize,
    WeightsOption,
    WeightStorage,
)
from fastblt.server.cli.written import write
from fastblt.server.request import DecodingMethod, DecodingParams, SamplingParams
from fastblt.server.settings import PRETRAINED


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    model: Annotated[
        str, typer.Option(help="Checkpoint folder or Hub id. Default: the shipped one.", show_default=False)
    ] = str(PRETRAINED),
    max_tokens: Annotated[int, typer.Option(help="Bytes at most.", rich_help_panel=SAMPLING)] = 256,
    temperature: Annotated[
        float, typer.Option(help="How freely bytes are drawn; 0 takes the likeliest.", rich_help_panel=SAMPLING)
    ] = 0.0,
    top_k: Annotated[
        int, typer.Option(help="Draw from so many of the likeliest bytes; 0 is all.", rich_help_panel=SAMPLING)
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(help="Draw from the likeliest bytes with this much probability.", rich_help_panel=SAMPLING),
    ] = 1.0,
    min_p: Annotated[
        float,
        typer.Option(
            help="Draw from bytes with this share of the likeliest one's probability.", rich_help_panel=SAMPLING
        ),
    ] = 0.0,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="The same seed gives the same bytes. Default: a new one.", rich_help_panel=SAMPLING
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="End before this text; may be given again. Default: none.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on where the model would end.", rich_help_panel=SAMPLING)
    ] = False,
    method: Annotated[
        DecodingMethod, typer.Option(help="How to decode (docs/decoding.md).", rich_help_panel=DECODING)
    ] = DecodingMethod.AUTO,
    block_size: BlockSize = None,
    draft_length: DraftLength = None,
    unmasking: UnmaskingOption = None,
    confidence_threshold: Confidence = None,
    entropy_bound: EntropyBound = None,
    entropy_rule: EntropyRuleOption = None,
    max_steps: MaxSteps = None,
    allow_untrained_block_size: UntrainedBlockSize = False,
    show: Annotated[
        bool, typer.Option("--show", help="Color the bytes by how each was made, and underline where patches begin.")
    ] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print speed and forward passes to stderr.")] = False,
    revision: Revision = None,
    device: Device = ENGINE_DEFAULTS.device,
    dtype: DtypeOption = None,
    weights: WeightsOption = WeightStorage.AUTO,
    cache_size: CacheSize = None,
    max_model_len: MaxModelLen = ENGINE_DEFAULTS.max_model_len,
    max_pass_rows: MaxPassRows = ENGINE_DEFAULTS.max_pass_rows,
    patching_threshold: Threshold = None,
    max_patch_length: MaxPatchLength = None,
    deterministic: Deterministic = False,
    threads: Threads = None,
) -> None:
    """Complete PROMPT on standard output, byte by byte as it comes."""
    quiet_openmp()
    with clean_errors():
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop=tuple(s.encode("utf-8", "surrogateescape") for s in stop or ()),
            ignore_eos=ignore_eos,
            return_rounds=show,
            decoding=DecodingParams(
                method=method,
                block_size=block_size,
                draft_length=draft_length,
                unmasking=unmasking,
                confidence_threshold=confidence_threshold,
                entropy_bound=entropy_bound,
                entropy_rule=entropy_rule,
                max_steps=max_steps,
            ),
        )
        logs.show_progress()
        from fastblt.server.llm import LLM

        llm = LLM(
            model,
            revision=revision,
            device=device,
            dtype=dtype,
            weights=weights,
            cache_bytes=cache_size,
            max_running=1,
            max_model_len=max_model_len,
            max_pass_rows=max_pass_rows,
            patching_threshold=patching_threshold,
            max_patch_length=max_patch_length,
            deterministic=deterministic,
            threads=threads,
            allow_untrained_block_size=allow_untrained_block_size,
        )
        written = write(llm.stream(prompt.encode("utf-8", "surrogateescape"), params), show=show)
        if stats:
            written.print_stats()
