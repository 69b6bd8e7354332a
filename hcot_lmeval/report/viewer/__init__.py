"""Traces to look at: one self-contained HTML page, or a tree in the terminal.

`reading` turns files into traces, `tree` says from a trace's events where every token ended up, `payload` packs that
for the page, `page` writes it, `terminal` prints. `cli` is ``hcot view``.

Model output is untrusted: whatever it spells, it is shown and never acts (see `page`).
"""
