"""The endpoint as an application of Ray Serve: replicas on one machine or on many, behind a front that has no model.

serve run multiverse_hf.serving.ray_serve:build model=./my-checkpoint replicas=4 gpus=1

The front passes requests on to replicas. If a replica dies before it begins to answer, another one is asked.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, create_model
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import Message, Receive, Scope, Send

from multiverse_hf.checkpoints import MAX_NUM_SEQS, Attention, Dtype, open_checkpoint, quiet

from .app import Gate, create_app, replay
from .config import ServerConfig, read_keys
from .metrics import Metrics
from .protocol import ApiError
from .worker import ModelWorker

TRIES = 2  # replicas that are asked: a request that kills its replica does not end them all
SPARE = 64  # requests beyond those that a replica takes: it refuses them itself, and answers /ready
SCOPE = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers")


class ReplicaOptions(BaseModel):
    """What a replica is, and how many there are. Options of ``multiverse serve`` have their names there."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, description="repository, or folder under the same path on every machine")
    name: str | None = Field(None, description="the model's name for clients; by default that of its folder")
    replicas: int = Field(2, ge=1)
    cpus: float = Field(1, ge=0, description="CPUs of a replica")
    gpus: float = Field(0, ge=0, description="GPUs of a replica")
    api_key_file: Path | None = None
    dtype: Dtype = Dtype.AUTO
    attn: Attention = Attention.SDPA
    device: str = "auto"
    threads: int | None = Field(None, ge=1)
    max_num_seqs: int = Field(MAX_NUM_SEQS, ge=1)
    max_cache_tokens: int | None = Field(None, ge=1)


_OTHERS = ("name", "keys", "log", "engine")  # are not given as they are
_BOUNDS = {each.name: (each.type, each.default) for each in fields(ServerConfig) if each.name not in _OTHERS}
DeploymentOptions = create_model("DeploymentOptions", __base__=ReplicaOptions, **_BOUNDS)


@serve.deployment
class Replica:
    """One model and its application.

    Args:
        options: what it is.
        config: bounds and keys.
    """

    def __init__(self, options: ReplicaOptions, config: ServerConfig) -> None:
        quiet()
        metrics = Metrics()
        self.worker = ModelWorker(config, metrics)
        checkpoint = open_checkpoint(options.model)
        self.worker.open(checkpoint, options.dtype, options.attn, options.device, options.threads)
        self.app = create_app(self.worker, config, metrics)

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
        """Return the messages of the application's answer. If the loop over them ends early, the client is gone."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        gone = asyncio.Event()

        async def receive() -> Message:
            await gone.wait()
            return {"type": "http.disconnect"}

        task = asyncio.ensure_future(self.app(scope, replay(body, receive), messages.put))
        task.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                yield message
        finally:
            gone.set()
        await task

    def check_health(self) -> None:
        """Raise RuntimeError if steps are due and none is made; Ray then starts the replica anew."""
        if not self.worker.is_healthy():
            raise RuntimeError("the engine makes no steps")

    def __del__(self) -> None:
        if hasattr(self, "worker"):
            self.worker.close()


@serve.deployment(max_ongoing_requests=100_000, ray_actor_options={"num_cpus": 0})
@serve.ingress()
class Front:
    """Passes requests on to replicas.

    Args:
        replicas: of the model.
        config: bounds and keys.
    """

    def __init__(self, replicas: DeploymentHandle, config: ServerConfig) -> None:
        self.replicas, self.config = replicas.options(stream=True, method_name="answer"), config

    def __serve_build_asgi_app__(self) -> Starlette:
        gate = Gate(self.pass_on, self.config, Metrics())
        return Starlette(routes=[Mount("/", gate)])

    async def pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request with what a replica answers."""
        body = (await receive())["body"]
        asked = {name: scope[name] for name in SCOPE if name in scope}
        died = ApiError(503, "the replica that answered has died; ask again", retry_after=5)
        for _ in range(TRIES):
            begun: Message | None = None
            answer = self.replicas.remote(asked, body)
            try:
                async for message in answer:
                    begun = begun or message
                    await send(message)
                return
            except RayActorError:
                if begun is None:
                    continue
                if not dict(begun["headers"]).get(b"content-type", b"").startswith(b"text/event-stream"):
                    raise
                line = f"data: {json.dumps(died.body())}\n\n"
                await send({"type": "http.response.body", "body": line.encode(), "more_body": False})
                return
            finally:
                answer.cancel()  # if the client goes away
        raise died


def build(options: DeploymentOptions) -> Application:
    """Return the application, for ``serve run`` and for Ray Serve's config files.

    Raises:
        CommandError: if the checkpoint or the keys cannot be used.
    """
    if options.model is not None and Path(options.model).is_dir():
        options.model = str(Path(options.model).resolve())  # a replica starts in another folder
    config = ServerConfig(
        name=options.name or Path(open_checkpoint(options.model).name).name,
        keys=read_keys([], options.api_key_file),
        engine={"max_num_seqs": options.max_num_seqs, "max_cache_tokens": options.max_cache_tokens},
        **{name: getattr(options, name) for name in _BOUNDS},
    )
    replicas = Replica.options(
        num_replicas=options.replicas,
        max_ongoing_requests=config.room + SPARE,
        graceful_shutdown_timeout_s=config.grace,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
    )
    return Front.bind(
        replicas.bind(ReplicaOptions(**options.model_dump(include={*ReplicaOptions.model_fields})), config), config
    )
