"""Decoding without a word to the host: the state of all rows lives beside the keys and values, and the host follows.

Read in this order: `fields` (what is known of a row), `state` (the rule as tensor arithmetic), `sampling` (and
`triton_sample`), `attention` and `backends` (ragged attention; `flash` and `triton_decode`, and `choice` between them),
`program` (one step), `graphs` (how it is run), `readback`, `loop`, `needs` (what is left to the host's own loop),
`build`.
"""
