"""What is installed and how the run is configured, read from metadata and source text alone: nothing examined is
imported."""
