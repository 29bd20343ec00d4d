"""Transforms of whole models: convert, merge, adapters and calibrate; and their summary."""
