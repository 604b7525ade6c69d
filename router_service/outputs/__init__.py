"""What a forward pass yields beside the next token: log-probabilities, pooled vectors, routes. Knows no scheduling."""
