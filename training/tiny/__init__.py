"""Training the tiny Qwen-Image: where its samples come from, cached latents, and the flow-matching task."""
