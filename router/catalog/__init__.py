"""What is served: the configuration, completed with the models that were found, and what is known of each."""
