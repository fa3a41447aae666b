"""Pictures of masks, curves and features, and what is computed for them."""
