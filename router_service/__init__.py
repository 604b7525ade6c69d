"""The coordinator: scheduler, paged KV cache, attention, gate, sampler, dispatch to experts."""
