"""Only so that the web UI is recognised."""
