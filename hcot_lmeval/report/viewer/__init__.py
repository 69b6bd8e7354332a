"""Traces to look at: one self-contained HTML page, or a tree in the terminal.

`reading` turns files into traces, `tree` replays a trace through the pruning rule and says where every token ended up,
`payload` packs that for the page, `build` writes the page, `terminal` prints. `cli` is ``scripts/view_traces.py``.

Model output is untrusted: whatever it spells, it is shown and never acts (see `build`).
"""
