"""Pages beside the data plane: lists, management, status, metrics, and the web page."""
