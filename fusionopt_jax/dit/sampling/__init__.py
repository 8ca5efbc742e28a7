"""From noise and labels to images: samplers, one paper a file, and their loop."""
