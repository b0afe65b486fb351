"""The full run: every measurement of the report, in resumable parts, and the report and the README made from them."""
