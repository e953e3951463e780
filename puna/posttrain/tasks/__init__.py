"""Tasks that can be verified: what post-training teaches, and is judged by."""
