"""Traces to look at: one self-contained HTML page, or a tree in the terminal.

`reading` turns files into traces, `tree` says from a trace's events where every token ended up, `page` packs and writes
that, `serve` hands the page out while a run goes on, `terminal` prints. `cli` is ``hcot view``.

Model output is untrusted: whatever it spells, it is shown and never acts (see `page`).
"""
