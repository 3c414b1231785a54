"""Key layouts: how names and suffixes are read and written."""
