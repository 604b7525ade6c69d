"""What `config.json`, `params.json` and `generation_config.json` say: an Architecture, and what their authors chose.

A family's own keys are in `cluster.checkpoint.families`. Knows no file of weights.
"""
