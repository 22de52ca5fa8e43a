"""What a run trains on: prompts, and images with captions where a method needs them, encoded once before training."""
