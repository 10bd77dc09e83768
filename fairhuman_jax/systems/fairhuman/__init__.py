"""FairHuman: global, face and hand objectives combined by a fair rule."""
