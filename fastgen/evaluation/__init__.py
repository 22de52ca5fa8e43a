"""Measuring generated images: Fréchet distances, prompt accuracy, diversity and speed, under named protocols."""
