"""What a server counts, for Prometheus. Labels are few and fixed: no prompts, ids or users."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 2, 3, 5, 10, 20, 30, 60, 120, 300, 600, 1200)
WAVES = (0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10, 30)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Of one server; nothing is global."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"qwen_image_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"qwen_image_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets, *labels: str) -> Histogram:
            return Histogram(f"qwen_image_{name}", text, labels, buckets=buckets, registry=registry)

        self.requests = counter("requests", "Requests answered; 499: the client had gone.", "endpoint", "status")
        self.request_seconds = histogram("request_seconds", "From a request to its answer.", BUCKETS, "endpoint")
        self.queue_seconds = histogram("queue_seconds", "From a request to its first work.", BUCKETS)
        self.first_partial = histogram("time_to_first_partial_seconds", "From a request to its first preview.", BUCKETS)
        self.running = gauge("running", "Requests that are being worked on.")
        self.queued = gauge("queued", "Requests that wait.")
        self.queued_tokens = gauge("queued_tokens", "Image tokens of requests that wait.")
        self.wave_seconds = histogram("wave_seconds", "One step of the requests in a wave.", WAVES)
        self.wave_tokens = histogram("wave_tokens", "Tokens of a wave, of all branches.", (64, 256, 1024, 4096, 16384))
        self.wave_requests = histogram("wave_requests", "Requests in a wave.", SIZES)
        self.stage_seconds = histogram("stage_seconds", "Stages of a request.", BUCKETS, "stage")
        self.images = counter("images", "Pictures made.")
        self.pixels = counter("pixels", "Their pixels.")
        self.steps = counter("steps", "Steps taken, of all requests.")
        self.cancelled = counter("cancelled", "Requests cancelled.", "reason")
        self.rejected = counter("rejected", "Requests refused.", "reason")
        self.failed = counter("failed", "Requests failed.", "kind")
        self.memory = gauge("memory_bytes", "Of the engine's process and GPU.", "kind")
        self.store_bytes = gauge("store_bytes", "Results that are kept.")
        self.loras = gauge("lora_loaded", "LoRAs registered.")
        self.restarts = counter("engine_restarts", "Engines started again after they had ended.")
        self.ready = gauge("ready", "1 where requests are taken.")

    def text(self) -> bytes:
        return generate_latest(self.registry)
