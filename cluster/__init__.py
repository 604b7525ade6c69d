"""The roof and the floor: composes the application above, holds config, messages, errors and checkpoints below."""
