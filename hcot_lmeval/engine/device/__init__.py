"""Decoding in which the host only follows: the state of all rows lives beside the keys and values.

Read in this order: `state` (the rule as tensor arithmetic), `sampling`, `attention` (ragged attention, and `choice` of
who computes it), `triton_kernels` (for both), `graphs` (how a step is run), `loop` (the step, who runs it, and what is
left to the host's own loop).
"""
