"""A module of a user's that cannot be imported, for experimental.custom_import."""

raise ValueError("not ready")
