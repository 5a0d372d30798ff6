"""Fuzzing of every reader: nothing but typed errors, in bounded time and memory."""
