"""The transformer itself: its layers, its blocks, and what conditions them."""
