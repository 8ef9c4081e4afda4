"""turbomoe: big mixture-of-experts language models with long context on one box."""

__version__ = "0.1.0"
