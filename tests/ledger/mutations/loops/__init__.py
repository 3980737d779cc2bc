"""Training loops as users write them, each right as it stands: faults are edits of these texts, or of frameworks."""
