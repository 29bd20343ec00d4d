"""Folders of adapters that PEFT writes and loads."""
