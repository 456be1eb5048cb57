"""Reading ViT tokens without an inverter: projection on the class embedding (Vilas et al. 2023)."""
