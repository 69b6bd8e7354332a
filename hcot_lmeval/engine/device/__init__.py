"""Decoding in which the host only follows: the state of all rows lives beside the keys and values.

Read in this order: `state` (the rule as tensor arithmetic), `sampling` (and `triton_sample`), `attention` (ragged
attention; `flash` and `triton_decode`, and `choice` between them), `program` (one step), `graphs` (how it is run),
`loop` (and what is left to the host's own loop).
"""
