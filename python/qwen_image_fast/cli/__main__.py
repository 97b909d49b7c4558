from qwen_image_fast.cli import app

app()
