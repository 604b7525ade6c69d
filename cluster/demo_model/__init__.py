"""The demo model: a small Mixtral with its tokenizer and chat template, trained by `train.py`, shipped in the wheel."""

from pathlib import Path

DIRECTORY = Path(__file__).parent
