"""Making drafters: distilled text, features, CSGD, losses, and a ``transformers.Trainer`` for them."""
