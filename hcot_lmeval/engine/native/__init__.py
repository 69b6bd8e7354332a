"""Compiled code for the CPU: a decoding step for models of the Llama kind, the choice of tokens for all.

Read in this order: `step`, `weights` (what the kernel sees of a model), `packing` (how it reads weights, and copies in
fewer bits), `build` (how the kernels are compiled).
"""
