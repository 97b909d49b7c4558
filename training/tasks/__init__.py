"""What is trained, and its loss."""
