"""What pages and data plane share: errors in each API's dialect, keys, origins of web pages."""
