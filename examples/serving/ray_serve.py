"""The server on a Ray cluster: replicas on as many machines and GPUs as there are, in front of them Ray Serve.

    python examples/serving/ray_serve.py --model Qwen/Qwen-Image --gpus 2 --guidance 2 --replicas 4 --keys keys.json

Each replica is the whole of `qwen-image-fast serve` without its socket: one engine, which batches by itself, so that
it is given many requests at once. Ray Serve routes to the replica with the fewest, starts and ends replicas, and
answers 429 where all are full. Jobs and addresses of results are known to the replica that made them alone: with more
than one, ask for the answer itself, or a stream. Needs the extras serve and ray, and Ray 2.60 or newer.
"""

import argparse
from pathlib import Path

import ray
from ray import serve

from qwen_image_fast.serving import settings


def application(arguments: argparse.Namespace) -> serve.Application:
    """What `serve.run` runs."""
    keys = [] if arguments.keys is None else settings.read_keys(Path(arguments.keys))
    model = settings.Model(
        name=arguments.model, device="cuda" if arguments.gpus else "cpu",
        dtype="bfloat16" if arguments.gpus else "float32", wave_tokens=8192 if arguments.gpus else 2048,
        guidance=arguments.guidance, ulysses=arguments.ulysses,
    )  # fmt: skip
    # Ray decides who waits: what it lets through is begun.
    limits = settings.Limits(wait=3600.0)
    told = settings.Settings(model=model, keys=keys, host=arguments.host, hosts=arguments.allow_host, limits=limits)

    def build():
        from qwen_image_fast.serving.app import Server

        return Server(told, ready_first=True).app

    return serve.deployment(
        serve.ingress(build)(),
        name="qwen-image-fast",
        max_ongoing_requests=arguments.ongoing,
        max_queued_requests=arguments.queued,
        backpressure_config={"status_code": 429, "retry_after_s": 5},
        autoscaling_config={
            "min_replicas": 1, "max_replicas": arguments.replicas, "target_ongoing_requests": arguments.ongoing / 2,
            "upscale_delay_s": arguments.upscale, "downscale_delay_s": 600,
        },
        graceful_shutdown_timeout_s=limits.drain,
        ray_actor_options={"num_cpus": 1, "num_gpus": arguments.gpus},
    ).bind()  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--keys", help="JSON list of keys, as of serve --api-key-file")
    parser.add_argument("--allow-host", action="append", default=[], help="a name that it is asked under")
    parser.add_argument("--gpus", type=int, default=0, help="of one replica: guidance x ulysses")
    parser.add_argument("--guidance", type=int, default=1)
    parser.add_argument("--ulysses", type=int, default=1)
    parser.add_argument("--replicas", type=int, default=1, help="at most")
    parser.add_argument("--upscale", type=float, default=30, help="seconds of load before one more replica is started")
    parser.add_argument("--ongoing", type=int, default=16, help="requests that a replica works on")
    parser.add_argument("--queued", type=int, default=64, help="requests that wait for a replica; more are 429")
    arguments = parser.parse_args()
    ray.init()
    serve.start(http_options={"host": arguments.host, "port": arguments.port})
    serve.run(application(arguments), blocking=True)


if __name__ == "__main__":
    main()
