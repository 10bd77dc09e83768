"""The systems: frozen records with one contract (docs/design.md, section 3)."""
