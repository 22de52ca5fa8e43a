"""Fused operations that PyTorch does not have. One folder an operation, each with a readable reference, a Triton kernel and a derivation."""
