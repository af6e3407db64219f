"""Artifact in, session out: each runtime in a worker process of its own.

A session never shares a process with its caller, so a runtime that crashes, hangs, prints or needs
other versions of its packages cannot harm the caller. Nothing here imports torch, but for
`torch_cuda` and its kernels (`cuda_layers`, `cuda_products`): they run a model in the caller's
process, on a GPU.
"""
