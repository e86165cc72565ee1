"""One small file a data set: its field names mapped to our records."""
