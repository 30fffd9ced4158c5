"""Programs for the Makefile: no part of FactScope."""
