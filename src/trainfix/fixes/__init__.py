"""The repairs: one module per fix, one folder per repaired package. The engine loads them by name."""
