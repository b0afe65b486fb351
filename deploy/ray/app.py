"""FastBLT on Ray Serve: `serve run fastblt.deploy.ray.app:build replicas=2`, or `serve deploy deploy/ray/serve.yaml`.

There are two deployments: the replicas, each an engine with its API, and the front, which receives every request. The
number of replicas is scaled by their running and waiting requests.
"""

# No `from __future__ import annotations` here: Ray builds the argument of `build` from its annotation, and needs the
# class itself and not a string.
from typing import Any

import msgspec
from pydantic import BaseModel, Field
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from fastblt.deploy.ray.front import Front
from fastblt.deploy.ray.replica import Replica
from fastblt.server.settings import EngineSettings, FailurePolicy, HttpSettings, ServiceSettings

#: Ray's router: requests of one session go to one replica, and to the next one on the hash ring while that is full.
_ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"

#: Seconds that a retiring replica has after `shutdown_timeout` to end its streams.
_LAST_WORDS = 15.0


class Options(BaseModel):
    """Arguments of `build`.

    `replicas` and `max_replicas` bound the number of engines. `cpus` and `gpus` are reserved for each (with tensor
    parallelism, for all its ranks together). A replica is added when there are more than `target_requests` requests,
    running or waiting, for each. `engine` has fields of `EngineSettings`; `api_keys` is as for `fastblt serve`. Delays
    and timeouts are seconds.
    """

    replicas: int = Field(default=1, ge=1)
    max_replicas: int | None = Field(default=None, ge=1)
    cpus: float = Field(default=1.0, gt=0)
    gpus: float = Field(default=0.0, ge=0)
    target_requests: float | None = Field(default=None, gt=0)
    upscale_delay: float = Field(default=10.0, ge=0)
    downscale_delay: float = Field(default=300.0, ge=0)
    shutdown_timeout: float = Field(default=30.0, ge=0)
    stall_timeout: float = Field(default=60.0, ge=1)
    api_keys: list[str] = Field(default_factory=list, repr=False)
    engine: dict[str, Any] = Field(default_factory=dict)
    #: Sets `engine["model"]` from the command line, which cannot nest options.
    model: str | None = None


def _front() -> Front:
    return Front(serve.get_deployment_handle("Replica"))


def build(options: Options) -> serve.Application:
    """The application. Raises ValueError for engine settings that do not exist."""
    given = options.engine | ({"model": options.model} if options.model else {})
    if unknown := sorted(given.keys() - set(EngineSettings.__dataclass_fields__)):
        raise ValueError(f"engine has no setting {unknown[0]!r}")
    engine = msgspec.convert(given, EngineSettings, strict=False)
    # A lost engine is not restarted here: Ray replaces the whole replica.
    service = ServiceSettings(stall_timeout=options.stall_timeout, on_engine_failure=FailurePolicy.STAY)
    http = HttpSettings(api_keys=tuple(options.api_keys), shutdown_timeout=options.shutdown_timeout)
    replicas = serve.deployment(
        Replica,
        name="Replica",
        max_ongoing_requests=2 * engine.max_running,
        max_queued_requests=engine.max_waiting,
        autoscaling_config=AutoscalingConfig(
            min_replicas=options.replicas,
            initial_replicas=options.replicas,
            max_replicas=max(options.replicas, options.max_replicas or 0),
            target_ongoing_requests=options.target_requests or 0.75 * engine.max_running,
            upscale_delay_s=options.upscale_delay,
            downscale_delay_s=options.downscale_delay,
        ),
        request_router_config=RequestRouterConfig(request_router_class=_ROUTER),
        health_check_period_s=2.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_timeout_s=options.shutdown_timeout + _LAST_WORDS,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
    )
    front = serve.deployment(
        serve.ingress(_front)(),
        name="Front",
        # It only waits for replicas, so it can have many requests at once.
        max_ongoing_requests=100_000,
        ray_actor_options={"num_cpus": 0},
    )
    return front.bind(replicas.bind(engine, service, http))
