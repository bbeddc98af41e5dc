"""The CUDA caching allocator of torch, modelled, and traces replayed through it.  No torch here."""
