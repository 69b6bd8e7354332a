"""Decoding without a word to the host: the state of all rows lives beside the keys and values, and the host follows.

Read in this order: `state` (the rule as tensor arithmetic), `sampling`, `attention` and `backends` (ragged attention),
`program` (one step), `graphs` (how it is run), `readback`, `loop`, `needs` (what is left to the host's own loop).
"""
