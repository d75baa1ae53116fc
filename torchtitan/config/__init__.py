"""Configuration: schema, loading from TOML and command line, and checks. Imports no torch."""
