"""Several engines behind one address, one for each GPU, by Ray Serve.

pip install 'ray[serve]'
serve run docs.examples.ray_serve:application model=path/to/gpt2 replicas=4 num_pages=8192

curl -N localhost:8000 -d '{"prompt": [464, 2068, 7586], "max_new_tokens": 64}'
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from bertgpt import Engine, SamplingOptions
from bertgpt.auto import load_language_model
from bertgpt.engine import EngineMetrics


@serve.deployment(max_ongoing_requests=1024)  # the engine queues, not Ray
class TextServer:
    """One replica: a model, its engine, and this process's share of the requests."""

    def __init__(self, model: str, device: str, num_pages: int) -> None:
        loaded = load_language_model(model).to(device).eval()
        self.engine = Engine(loaded, num_pages=num_pages)

    async def stream(
        self, prompt: list[int], max_new_tokens: int, sampling: dict[str, Any] | None = None
    ) -> AsyncIterator[int]:
        """Token ids as they are chosen. Whoever stops reading ends the request."""
        options = SamplingOptions(**(sampling or {}))
        async for new in self.engine.stream(prompt, max_new_tokens, sampling=options):
            yield new.token

    async def metrics(self) -> tuple[str, EngineMetrics]:
        """This replica's id, and what its engine has done."""
        return serve.get_replica_context().replica_id.unique_id, self.engine.metrics()

    async def __call__(self, request: Request) -> Response:
        """Over HTTP: the arguments of `stream` as JSON, a line for each token."""
        try:
            call = json.loads(await request.body())
            options = SamplingOptions(**call.pop("sampling", {}))
            new_tokens = self.engine.stream(**call, sampling=options)
        except (TypeError, ValueError, IndexError) as error:  # the request is wrong, and named
            return JSONResponse({"error": str(error)}, status_code=400)
        lines = (json.dumps({"token": new.token}) + "\n" async for new in new_tokens)
        return StreamingResponse(lines, media_type="application/x-ndjson")


def application(arguments: dict[str, str]) -> serve.Application:
    """What `serve run` deploys.

    Args:
        arguments: `model`, a checkpoint's folder; `num_pages` of each engine's cache; and perhaps
            `replicas` (1) and `gpus`, how many each replica has to itself (1; 0 for a CPU).
    """
    gpus = int(arguments.get("gpus", 1))
    deployment = TextServer.options(
        num_replicas=int(arguments.get("replicas", 1)), ray_actor_options={"num_gpus": gpus}
    )
    device = "cuda" if gpus else "cpu"  # Ray shows each replica its own GPU alone
    return deployment.bind(arguments["model"], device, int(arguments["num_pages"]))
