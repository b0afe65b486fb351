"""The HTTP application around one engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from fastblt.server.api import completions, errors, operations, page, tokenization
from fastblt.server.api.bodies import Bodies
from fastblt.server.api.metrics import Metrics
from fastblt.server.api.middleware import Requests
from fastblt.server.api.security import Browsers, Gate
from fastblt.server.api.tracing import Tracer
from fastblt.server.process.client import EngineClient
from fastblt.server.settings import HttpSettings, SchedulingPolicy


def create_app(client: EngineClient, http: HttpSettings | None = None) -> FastAPI:
    """An app whose lifespan starts and stops the engine of `client`.

    It answers while the engine still loads. Sets `client.observers` to the app's metrics and tracer.

    Raises TracingUnavailableError when `http.otlp_endpoint` is set and OpenTelemetry is not installed.
    """
    http = http or HttpSettings()
    tracer = Tracer(http.otlp_endpoint) if http.otlp_endpoint else None

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await client.start()
        try:
            yield
        finally:
            # The server has let its connections finish before it ends the lifespan.
            await client.stop()
            if tracer is not None:
                await tracer.close()

    # No documentation pages: they would load scripts from other hosts. No redirects: they would trust the Host header.
    app = FastAPI(title="FastBLT", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    metrics = Metrics(client, vllm_names=http.vllm_metrics)
    app.state.client = client
    app.state.metrics = metrics
    app.state.bodies = Bodies()
    app.state.default_max_tokens = http.default_max_tokens
    app.state.priorities = http.scheduling_policy is SchedulingPolicy.PRIORITY
    client.observers = (metrics.observe, tracer.observe) if tracer is not None else (metrics.observe,)
    errors.install(app)
    app.include_router(completions.router)
    app.include_router(tokenization.router)
    app.include_router(operations.router)
    # The middleware added last runs first. CORS runs before the key check: a browser's preflight request has no key.
    open_paths: frozenset[str] = frozenset()
    if http.page:
        app.include_router(page.router)
        open_paths = page.PATHS
    app.add_middleware(Gate, keys=http.api_keys, on_refusal=metrics.count_rejected, open_paths=open_paths)
    if http.cors_origins:
        app.add_middleware(
            Browsers,
            allow_origins=http.cors_origins,
            allow_methods=["GET", "POST"],
            # OpenAI's client sends a dozen headers of its own, and more with each version. The server acts on none.
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", "x-should-retry", "x-ignored-fields"],
        )
    app.add_middleware(Requests, metrics=metrics, access_log=http.access_log)
    return app
