"""The engine's metrics and traces. Knows steps and sequences; changes neither."""
