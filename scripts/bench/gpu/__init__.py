"""What a GPU has to show before its figures are believed: right kernels, right tokens, steps near the memory's speed.

`probes` (every attention backend), `identity` (the device's loop against the slow twin), `steps` (their times), `cli`.
"""
