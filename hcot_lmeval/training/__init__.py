"""Training on exactly the contexts that the decoder will see."""
