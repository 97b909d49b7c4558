"""What `accelerate.py` puts in the place of diffusers' parts. Only these files know diffusers, and import it late."""
