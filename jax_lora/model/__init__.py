"""The network: configuration, rotary embedding, Flax modules and adapters as plain pytrees."""
