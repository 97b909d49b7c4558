"""What a recipe says."""
