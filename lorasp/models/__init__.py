"""Building a model: shapes on the meta device, weights streamed in, adapters attached, units sharded."""
