"""From data sets to packed rows: sources, texts, compiled documents, rows."""
