"""The full run: all measurements of the report, in resumable parts, and the pages that are made from them."""
