"""Text and token ids: tokenizers, chat templates, control tokens, streams of text. Knows no request and no wire."""
