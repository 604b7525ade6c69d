"""Models whose code is transformers': built without weights, their tensors read by the process that holds them.

What stays here is what a coordinator and a shard both need: the model on the meta device, where its experts are in it,
and which stored tensors are whose. A shard runs the model's own experts class for its experts. Knows neither attention
nor cache nor dispatch.
"""
