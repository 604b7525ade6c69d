"""`manta verify`: a model that is here, computed by us and by transformers on this machine. Knows no family."""
