"""Producers make batches and keep a bounded store full; consumers only train."""
