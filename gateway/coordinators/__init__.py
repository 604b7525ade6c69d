"""Which coordinator answers, and the streams of tokens from it, through deaths. Knows token ids; knows no text."""
