"""The demo model: what a first run serves when nothing is configured. Made by `tools/train_demo.py`."""

from pathlib import Path

MODEL_PATH: Path = Path(__file__).with_name("demo.gguf")
