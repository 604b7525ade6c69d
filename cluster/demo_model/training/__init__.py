"""Makes the demo model: its corpus, its tokenizer, its training. Not needed to serve it, and not in the wheel."""
