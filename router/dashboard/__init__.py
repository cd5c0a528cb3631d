"""The operator's page at /dashboard."""
