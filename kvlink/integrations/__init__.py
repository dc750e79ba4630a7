"""kvlink in other libraries' terms. Each module is imported on demand, with what it needs."""
