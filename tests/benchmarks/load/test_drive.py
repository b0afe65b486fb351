"""The load generator's connections."""

from __future__ import annotations

import asyncio

from aiohttp import web

from fastblt.benchmarks.load.client import IDLE_SECONDS
from fastblt.benchmarks.load.drive import _session


def test_no_connection_is_used_again_that_a_server_may_be_closing() -> None:
    """Servers close idle connections after five seconds or more; a request that meets the closing is lost."""
    peers: list[object] = []

    async def answer(request: web.Request) -> web.Response:
        peers.append(request.transport)
        return web.Response(text="ok")

    async def run() -> None:
        app = web.Application()
        app.router.add_get("/", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
        async with _session() as session:
            for pause in (0.0, 0.1, IDLE_SECONDS + 0.5):
                await asyncio.sleep(pause)
                async with session.get(url) as response:
                    await response.read()
        await runner.cleanup()

    asyncio.run(run())
    assert peers[0] is peers[1] is not peers[2] and IDLE_SECONDS < 5
