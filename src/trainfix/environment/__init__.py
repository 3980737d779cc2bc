"""What is installed and how the run is configured, from metadata and source text: nothing examined is imported."""
