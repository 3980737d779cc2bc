"""Finds the targets as they are imported, decides, replaces, keeps the journal, and says what it did."""
