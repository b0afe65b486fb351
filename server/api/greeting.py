"""What a server says of itself when it is ready: for people a few lines, for programs the fields of one event."""

from __future__ import annotations

from typing import Any

from fastblt.server.process.client import EngineClient
from fastblt.server.settings import HttpSettings

_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}


def address(host: str, port: int, scheme: str) -> str:
    """The URL of a socket's address as somebody on this machine opens it."""
    name = _EVERYWHERE.get(host, f"[{host}]" if ":" in host else host)
    return f"{scheme}://{name}:{port}"


def facts(client: EngineClient, url: str, http: HttpSettings) -> dict[str, Any]:
    """The fields of the event: model, address, device, code, memory. Raises EngineUnavailableError."""
    about, config = client.about, client.config
    fields: dict[str, Any] = {
        "model": client.model_name,
        "url": url,
        "page": f"{url}/" if http.page else None,
        "max_model_len": client.max_model_len,
        "patching_threshold": config.patching_threshold,
        "block_sizes": list(config.block_sizes),
        "keys": len(http.api_keys),
    }
    if about is not None:
        fields |= vars(about)
    return fields


def lines(fields: dict[str, Any]) -> str:
    """The same for people, below the first line."""
    rows = []
    if fields["page"]:
        rows.append(("page", fields["page"]))
    rows.append(("API", f"{fields['url']}/v1" + (", with a key" if fields["keys"] else "")))
    if "weights" in fields:
        rows.append(("model", f"{_count(fields['weights'])} weights, {fields['dtype']}{_blocks(fields)}"))
        rows.append(("runs on", f"{fields['device']}: {fields['code']}"))
        rows.append(
            ("caches", f"{fields['cache_bytes'] / 2**30:.1f} GiB; {fields['max_model_len']:,} bytes a request at most")
        )
    key = " -H 'Authorization: Bearer KEY'" if fields["keys"] else ""
    rows.append(("try", f"curl {fields['url']}/v1/completions{key} -H 'Content-Type: application/json' \\"))
    rows.append(("", """     -d '{"prompt": "while True:\\n", "max_tokens": 80}'"""))
    return "\n".join(f"  {name:<8}{text}" for name, text in rows)


def _blocks(fields: dict[str, Any]) -> str:
    sizes = fields["block_sizes"]
    return f", blocks of {', '.join(map(str, sizes))} bytes" if sizes else ", no diffusion head"


def _count(weights: int) -> str:
    return f"{weights / 1e9:.1f} billion" if weights >= 1e9 else f"{weights / 1e6:.1f} million"
