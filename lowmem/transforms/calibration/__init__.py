"""Codes chosen by what layers compute on sample inputs."""
