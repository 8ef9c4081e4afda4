"""Requests in, events out: the engine, its slots and its sampling."""
