"""Qwen-Image, fast."""
