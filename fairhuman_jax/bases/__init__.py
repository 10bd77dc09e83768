"""Text-to-image bases: their text, denoiser, codec and noise process, opened from files."""
