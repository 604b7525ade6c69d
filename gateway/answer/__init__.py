"""What callers get: a choice's text and calls, and the bodies of OpenAI's answers. Knows no wire."""
