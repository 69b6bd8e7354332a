"""Times engines on equal work: random weights, scripted tokens, ratios within one run; see ``docs/benchmark.md``."""
