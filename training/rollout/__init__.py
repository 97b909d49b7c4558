"""What a model draws to learn from: prompts, pictures, what they count."""
