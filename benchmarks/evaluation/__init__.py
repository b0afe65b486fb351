"""What the bytes are worth: `fastblt eval`, against any server's HTTP endpoint."""
