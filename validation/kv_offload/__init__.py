"""What vLLM's own offloading manager kept in host memory, for the KV tier of perfsim to repeat."""
