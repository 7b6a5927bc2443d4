"""Nothing to install: X-Adapter runs on what the WebUI brings."""
