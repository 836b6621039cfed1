"""Training of drafters: text as the target writes it, features, Coupled Sequential Glancing Distillation, a trainer."""
