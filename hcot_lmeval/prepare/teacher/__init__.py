"""Asks a language model for help: one question after the other, each only once, within a budget."""
