"""The DeepSpeed JSON: its keys, its rules, and what comes of it."""
