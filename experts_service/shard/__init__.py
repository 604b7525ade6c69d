"""The shard's side: the actor, its lane server, batches. Knows its weights; knows no coordinator's state."""
