"""What is measured, shown and judged while a model trains."""
