"""From flat chains of thought to checked hierarchical traces; importing any module here costs next to nothing."""
