"""Tables about narrow weights."""

from __future__ import annotations

from fastblt.benchmarks.markdown import number, percent, table
from fastblt.benchmarks.report.facts import Results


def speed(results: Results) -> str:
    """Bytes a second by how weights are kept."""
    rows = [
        [
            f"{result['shape'].upper()}, {size}",
            kind,
            name,
            number(row["bytes_per_second"]),
            f"{row['ratio']:.2f}",
            f"{row['predicted_over_measured']:.2f}",
            percent(row["read_share"]),
            percent(row["equal"]),
        ]
        for result in results.values()
        for size, kinds in result["batches"].items()
        for kind, settings in kinds.items()
        for name, row in settings.items()
    ]
    columns = (
        *("shape, requests", "weights", "method", "bytes a second", "over float32", "predicted / measured"),
        *("of the read bandwidth, %", "bytes of float32's blt, %"),
    )
    return table(columns, rows)


def quality(results: Results) -> str:
    """What narrow weights change in what a model says."""
    rows = [
        [
            result["shape"].upper() if result["shape"] else "shipped",
            kind,
            f"{row['bytes_per_weight']:.2f}",
            f"{row['bits_per_byte']:.4f}",
            percent(row["same_choice"], 1),
            percent(row["leading"], 1),
            ", ".join(f"{name} {percent(share, 1)}" for name, share in row["acceptance"].items()),
            str(row["not_lossless"]),
        ]
        for result in results.values()
        for kind, row in result["weights"].items()
    ]
    columns = (
        *(
            "shape",
            "weights",
            "bytes a weight",
            "bits a byte",
            "same choice, %",
            "greedy bytes before the first other, %",
        ),
        *("accepted, %", "outputs unlike blt's"),
    )
    return table(columns, rows)


def maps(results: Results) -> str:
    """Milliseconds of a map by rows."""
    [result] = results.values()
    kinds = list(next(iter(result["milliseconds"].values())))
    rows = [[count, *(f"{own[kind]:.2f}" for kind in kinds)] for count, own in result["milliseconds"].items()]
    return table(("rows", *kinds), rows)


def peer_loop(results: Results) -> str:
    """Passes of a 1B BLT beside those of llama.cpp."""
    [result] = results.values()
    rows = [
        [kind, count, f"{row['theirs_ms']:.0f}", f"{row['ours_ms']:.0f}", f"{row['over']:.2f}"]
        for kind, own in result["kinds"].items()
        for count, row in own.items()
    ]
    theirs, ours = (f"{result[name] / 1e9:.2f} billion" for name in ("their_weights", "our_weights"))
    columns = ("weights", "rows", f"llama.cpp, {theirs} weights, ms", f"ours, {ours}, ms", "theirs over ours, a weight")
    return table(columns, rows)


def large(results: Results) -> str:
    """A large checkpoint over HTTP."""
    rows = [
        [
            result["weights"],
            f"{result['start_seconds']:.0f} s",
            f"{result['stays_gib']:.1f}, {result['start_peak_gib']:.1f}",
            name,
            f"{row['bytes_per_second']:.1f}",
            percent(row["read_share"]),
            percent(row["decoding_share"]) if "decoding_share" in row else "",
            "yes" if row["equal"] else "no",
        ]
        for result in results.values()
        for name, row in result["settings"].items()
    ]
    columns = (
        *("weights", "start", "GiB that stay, peak", "method", "bytes a second"),
        *("of the read bandwidth, %", "after the first byte, %", "bytes of blt"),
    )
    return table(columns, rows)


def keys_values(results: Results) -> str:
    """What keys and values of 16 bits could save, and what they would change."""
    [result] = results.values()
    rows = []
    for requests, own in result["ms"].items():
        least, *_, most = own.values()
        rows.append([requests, *(f"{taken:.0f}" for taken in own.values()), percent((most - least) / most / 2)])
    contexts = list(next(iter(result["ms"].values())))
    columns = ("requests", *(f"{number(int(patches))} patches, ms" for patches in contexts), "could be saved, %")
    text = (
        f"Rounding keys and values to bfloat16 makes {result['rounded']:.4f} bits a byte of {result['bits']:.4f}, and "
        f"leaves {percent(result['same_choice'], 1)} % of the choices."
    )
    return f"{table(columns, rows)}\n\n{text}"
